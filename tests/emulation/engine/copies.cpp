// cp.async: a copy lands somewhere between its start and the wait that covers it; until then its target is
// poison.
#include <cstring>

#include "block.h"

namespace cuda_cnn::emulation {

namespace {

void land(Copy& copy) {
  if (copy.landed) return;
  std::memcpy(copy.destination, copy.source, copy.source_bytes);
  std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.landed = true;
}

}  // namespace

void copy_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes,
                const Site& site) {
  char* target = static_cast<char*>(shared_pointer(destination, bytes, site));
  if (destination % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    report(true, site, "cp.async: a copy of %u bytes from %p to +%u is misaligned", bytes, source,
           destination - kSharedBase);
  }
  if (source_bytes > bytes)
    report(true, site, "cp.async: %u source bytes for a copy of %u", source_bytes, bytes);
  if (options.bounds && source_bytes > 0 && !in_registered_range(source, source_bytes)) {
    report(true, site, "cp.async: global read of %u bytes at %p, outside every tensor", source_bytes, source);
  }
  if (options.counters) {
    count_access(Traffic::kCopyStore, target, bytes, site);
    if (source_bytes > 0) count_access(Traffic::kCopyLoad, source, source_bytes, site);
  }
  if (options.races && source_bytes > 0) global_shadow_access(source, source_bytes, Access::kRead, site);
  if (options.races) shadow_copy_started(destination - kSharedBase, bytes, site);
  std::memset(target, kPoison, bytes);
  current->copies.push_back(
      {target, static_cast<const char*>(source), bytes, source_bytes, current->copy_group, false});
  const bool lands_now =
      options.landing == Landing::kEarly || (options.landing == Landing::kRandom && random_number() % 2 == 0);
  if (lands_now) land(current->copies.back());
}

void copy_commit() { ++current->copy_group; }

// Copies that belong to no group yet (not committed) are not waited for.
void copy_wait(uint32_t pending_groups) {
  size_t kept = 0;
  for (Copy& copy : current->copies) {
    if (copy.group + pending_groups < current->copy_group) {
      land(copy);
      if (options.races)
        shadow_copy_landed(static_cast<uint32_t>(copy.destination - block.shared), copy.bytes);
    } else {
      current->copies[kept++] = copy;
    }
  }
  current->copies.resize(kept);
}

void land_all(Fiber& fiber) {
  for (Copy& copy : fiber.copies) land(copy);
  fiber.copies.clear();
}

}  // namespace cuda_cnn::emulation
