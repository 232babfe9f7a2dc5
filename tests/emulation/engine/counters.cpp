// What a request of a warp costs: passes over the 32 banks of shared memory, 32-byte sectors of global
// memory. The bank model is the usual one: 16-byte accesses go eight lanes at a time, 8-byte ones sixteen at
// a time.
#include <algorithm>
#include <string>
#include <tuple>

#include "block.h"

namespace cuda_cnn::emulation {

namespace {

struct Total {
  uint64_t requests = 0, cost = 0, ideal = 0;
};
struct SiteOrder {
  bool operator()(const std::pair<Traffic, Site>& a, const std::pair<Traffic, Site>& b) const {
    const auto key = [](const auto& k) {
      return std::make_tuple(k.first, k.second.file, k.second.line, k.second.pc);
    };
    return key(a) < key(b);
  }
};
std::map<std::pair<Traffic, Site>, Total, SiteOrder> totals;

bool is_global(Traffic traffic) { return traffic >= Traffic::kGlobalLoad; }

size_t sort_unique(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

// The units (of unit_bytes) that lanes [first, first + count) of the request touch, each once.
std::vector<uint64_t>& units_of(const Request& request, uint32_t first, uint32_t count, uint32_t unit_bytes) {
  static std::vector<uint64_t> units;
  units.clear();
  for (uint32_t lane = first; lane < first + count; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uint64_t begin = request.address[lane], end = begin + request.bytes - 1;
    for (uint64_t unit = begin / unit_bytes; unit <= end / unit_bytes; ++unit) units.push_back(unit);
  }
  sort_unique(units);
  return units;
}

void add_sectors(Total& total, const Request& request) {
  total.cost += units_of(request, 0, kWarpSize, 32).size();
  total.ideal += (units_of(request, 0, kWarpSize, 1).size() + 31) / 32;
}

void add_bank_passes(Total& total, const Request& request) {
  const uint32_t together = request.bytes >= 16 ? 8 : request.bytes == 8 ? 16 : 32;
  for (uint32_t first = 0; first < kWarpSize; first += together) {
    const std::vector<uint64_t>& words = units_of(request, first, together, 4);
    uint32_t in_bank[32] = {};
    for (uint64_t word : words) ++in_bank[word % 32];
    total.cost += *std::max_element(in_bank, in_bank + 32);
    total.ideal += (words.size() + 31) / 32;
  }
}

}  // namespace

void count_request(Traffic traffic, const Request& request, const Site& site) {
  Total& total = totals[{traffic, site}];
  ++total.requests;
  is_global(traffic) ? add_sectors(total, request) : add_bank_passes(total, request);
}

// Fibers run one after the other: the n-th access of every lane at a site is taken to be one request of the
// warp.
void count_access(Traffic traffic, const void* pointer, uint32_t bytes, const Site& site) {
  const uint64_t site_key =
      reinterpret_cast<uintptr_t>(site.file) * 31 + site.line * 7919 + reinterpret_cast<uintptr_t>(site.pc);
  SiteRequests& requests = current->warp->requests[site_key * 8 + static_cast<uint64_t>(traffic)];
  requests.site = site;
  requests.traffic = traffic;
  const uint32_t n = requests.seen[current->lane]++;
  while (n - requests.first >= requests.open.size()) requests.open.emplace_back();
  Request& request = requests.open[n - requests.first];
  request.lanes |= 1u << current->lane;
  request.bytes = std::max(request.bytes, bytes);
  const uint64_t address = reinterpret_cast<uintptr_t>(pointer);
  request.address[current->lane] =
      is_global(traffic) ? address : address - reinterpret_cast<uintptr_t>(block.shared);
  while (!requests.open.empty() && requests.open.front().lanes == ~0u) {
    count_request(traffic, requests.open.front(), site);
    requests.open.pop_front();
    ++requests.first;
  }
}

void count_finish_block() {
  for (Warp& warp : block.warps) {
    for (auto& [key, requests] : warp.requests) {
      for (const Request& request : requests.open) {
        if (request.lanes != 0) count_request(requests.traffic, request, requests.site);
      }
    }
    warp.requests.clear();
  }
}

}  // namespace cuda_cnn::emulation

#pragma GCC visibility push(default)

// One line a site: traffic, site, requests, cost, ideal cost, separated by tabs.
extern "C" const char* emulation_counters() {
  using namespace cuda_cnn::emulation;
  static const char* const kNames[] = {"shared load", "shared store", "ldmatrix",     "cp.async store",
                                       "global load", "global store", "cp.async load"};
  static std::string text;
  text.clear();
  for (const auto& [key, total] : totals) {
    text += std::string(kNames[static_cast<int>(key.first)]) + '\t' + describe(key.second) + '\t' +
            std::to_string(total.requests) + '\t' + std::to_string(total.cost) + '\t' +
            std::to_string(total.ideal) + '\n';
  }
  return text.c_str();
}

extern "C" void emulation_reset_counters() { cuda_cnn::emulation::totals.clear(); }

#pragma GCC visibility pop
