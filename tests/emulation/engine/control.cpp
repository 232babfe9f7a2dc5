// The report, and the C interface through which tests set options and register memory.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>

#include "block.h"

namespace cuda_cnn::emulation {

Options options;

namespace {

constexpr size_t kTooMany = 1000;  // a block that reports more is given up
std::string report_text;
size_t reports = 0;
std::set<std::string> reported;  // one line a site and kind
std::mutex registered_lock;
std::map<uintptr_t, uintptr_t> registered;  // begin → end

}  // namespace

Site::Site(const std::experimental::source_location& location)
    : file(location.file_name()), line(static_cast<int>(location.line())) {}

// file:line, or the offset in this library of an instruction, which the tests turn into one with addr2line.
std::string describe(const Site& site) {
  char text[64];
  if (site.file != nullptr) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
  }
  Dl_info info;
  if (site.pc == nullptr || dladdr(site.pc, &info) == 0) return "?";
  const auto offset = static_cast<const char*>(site.pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(text, sizeof(text), "@0x%zx", static_cast<size_t>(offset));
  return text;
}

void report(bool fatal, const Site& site, const char* format, ...) {
  ++reports;
  const std::string where = describe(site);
  if (reported.insert(where + format).second && reported.size() <= 50) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    report_text += where + ": " + text;
    if (current != nullptr) {
      const Dim3 &b = block.index, &t = current->thread;
      std::snprintf(text, sizeof(text), "  [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
      report_text += text;
    }
    report_text += '\n';
  }
  if (current != nullptr && (fatal || reports >= kTooMany)) abort_block();
}

size_t report_count() { return reports; }

void clear_report() {
  reports = 0;
  report_text.clear();
  reported.clear();
}

int launch_error() { return static_cast<int>(options.launch_error); }
int attributes_error() { return static_cast<int>(options.attributes_error); }
int current_gpu() { return static_cast<int>(options.gpu); }

const char* last_report() { return report_text.c_str(); }

bool in_registered_range(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  const std::lock_guard<std::mutex> lock(registered_lock);
  auto after = registered.upper_bound(begin);
  if (after == registered.begin()) return false;
  --after;
  return begin + bytes <= after->second;
}

}  // namespace cuda_cnn::emulation

using namespace cuda_cnn::emulation;

#pragma GCC visibility push(default)
extern "C" {

// False for a name or value that does not exist.
bool emulation_set(const char* name, unsigned value) {
  const std::string option = name;
  if (option == "schedule" && value <= 3) {
    options.schedule = static_cast<Schedule>(value);
  } else if (option == "landing" && value <= 2) {
    options.landing = static_cast<Landing>(value);
  } else if (option == "seed") {
    options.seed = value;
  } else if (option == "races") {
    options.races = value != 0 && !CUDA_CNN_ADDRESS_SANITIZER;  // which sees the plain accesses in our place
  } else if (option == "bounds") {
    options.bounds = value != 0;
  } else if (option == "counters") {
    options.counters = value != 0;
  } else if (option == "launch_error") {
    options.launch_error = value;
  } else if (option == "attributes_error") {
    options.attributes_error = value;
  } else if (option == "gpu") {
    options.gpu = value;
  } else if (option == "dry_run") {
    options.dry_run = value != 0;
  } else {
    return false;
  }
  return true;
}

const char* emulation_report() { return last_report(); }

void emulation_register(const void* pointer, size_t bytes) {
  const std::lock_guard<std::mutex> lock(registered_lock);
  registered[reinterpret_cast<uintptr_t>(pointer)] = reinterpret_cast<uintptr_t>(pointer) + bytes;
}

void emulation_unregister(const void* pointer) {
  const std::lock_guard<std::mutex> lock(registered_lock);
  registered.erase(reinterpret_cast<uintptr_t>(pointer));
}
}
#pragma GCC visibility pop
