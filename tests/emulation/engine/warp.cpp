// Collectives of a warp: the lanes meet, the last one computes for all.
#include <cstring>

#include "block.h"
#include "kernels/host_device.h"

namespace cuda_cnn::emulation {

namespace {

// The meeting that this lane joins, opened if it is the first. Lanes that wait elsewhere are an error.
Collective& join(Warp& warp, WarpOp op, uint32_t lanes, WarpFunction fn, const Site& site) {
  const uint32_t self = 1u << current->lane;
  Collective* unused = nullptr;
  for (Collective& open : warp.collectives) {
    if (!open.open) {
      if (unused == nullptr) unused = &open;
      continue;
    }
    if (open.op == op && open.lanes == lanes && !(open.arrived & self)) {
      if (!(open.site == site)) {
        report(false, site, "other lanes of the warp wait in the same operation at %s",
               describe(open.site).c_str());
      }
      return open;
    }
    if (open.lanes & self) {
      report(true, site, "lane %d should be in the operation at %s, where lanes %08x wait (divergent warp)",
             current->lane, describe(open.site).c_str(), open.arrived);
    }
  }
  if (unused == nullptr) report(true, site, "more divergent groups of lanes than the emulator keeps");
  unused->open = true;
  unused->op = op;
  unused->lanes = lanes;
  unused->arrived = 0;
  unused->fn = fn;
  unused->site = site;
  return *unused;
}

void require_whole_warp(const char* what, uint32_t lanes, const Site& site) {
  if (lanes != ~0u) report(true, site, "%s by an incomplete warp, lanes %08x", what, lanes);
}

}  // namespace

void warp_collective(WarpOp op, uint32_t lanes, void* data, WarpFunction fn, const Site& site) {
  Warp& warp = *current->warp;
  const uint32_t self = 1u << current->lane;
  if (!(lanes & self)) report(true, site, "lane %d is not in its own mask %08x", current->lane, lanes);
  if (lanes & ~warp.live) {
    report(false, site, "mask %08x names lanes that have exited or never were (live: %08x)", lanes,
           warp.live);
    lanes &= warp.live;
  }
  Collective& meeting = join(warp, op, lanes, fn, site);
  meeting.arrived |= self;
  meeting.data[current->lane] = data;
  if (meeting.arrived != lanes) return block_current("an operation of the warp", site);

  if (fn != nullptr) fn(warp, lanes, meeting.data, site);
  if (op == WarpOp::kBarrier && options.races) shadow_warp_barrier(warp, lanes);
  meeting.open = false;
  Fiber* fibers = &block.fibers[warp.id * kWarpSize];
  for (uint32_t rest = lanes & ~self; rest != 0; rest &= rest - 1) make_ready(fibers[__builtin_ctz(rest)]);
  maybe_yield();
}

void warp_barrier(uint32_t lanes, const Site& site) {
  warp_collective(WarpOp::kBarrier, lanes, nullptr, nullptr, site);
}

void shuffle(Warp&, uint32_t lanes, void* const* data, const Site& site) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto& self = *static_cast<ShuffleData*>(data[lane]);
    const int first = lane & ~(self.width - 1), last = first + self.width - 1;
    int source = lane;
    switch (self.kind) {
      case ShuffleKind::kIndex:
        source = first + (self.argument & (self.width - 1));
        break;
      case ShuffleKind::kUp:
        source = lane - self.argument < first ? lane : lane - self.argument;
        break;
      case ShuffleKind::kDown:
        source = lane + self.argument > last ? lane : lane + self.argument;
        break;
      case ShuffleKind::kXor:
        source = (lane ^ self.argument) > last ? lane : lane ^ self.argument;
        break;
    }
    if (lanes >> source & 1) {
      self.result = static_cast<ShuffleData*>(data[source])->value;
    } else {
      report(false, site, "shuffle reads lane %d, which is not in the mask %08x", source, lanes);
      self.result = ~uint64_t{0};
    }
  }
}

void ballot(Warp&, uint32_t lanes, void* const* data, const Site&) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1)
      votes |= static_cast<uint32_t>(static_cast<BallotData*>(data[lane])->predicate) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) static_cast<BallotData*>(data[lane])->result = votes;
  }
}

// ---- ldmatrix: lane 8 i + r names row r of matrix i ----

void load_matrix(Warp& warp, uint32_t lanes, void* const* data, const Site& site) {
  require_whole_warp("ldmatrix", lanes, site);
  const int matrices = static_cast<LoadMatrixData*>(data[0])->matrices;
  uint16_t element[4][8][8];
  Fiber* self = current;
  for (int i = 0; i < matrices; ++i) {
    Request request;
    request.bytes = 16;
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * i + row;
      const uint32_t address = static_cast<LoadMatrixData*>(data[lane])->row_address;
      if (address % 16 != 0)
        report(true, site, "ldmatrix: the row of lane %d is not aligned to 16 bytes", lane);
      const void* source = shared_pointer(address, 16, site);
      if (options.races) {
        current = &block.fibers[warp.id * kWarpSize + lane];  // the lane that asks for this row reads it
        shadow_access(address - kSharedBase, 16, Access::kRead, site);
        current = self;
      }
      std::memcpy(element[i][row], source, 16);
      request.lanes |= 1u << row;
      request.address[row] = address;
    }
    if (options.counters) count_request(Traffic::kLoadMatrix, request, site);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& self_data = *static_cast<LoadMatrixData*>(data[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < matrices; ++i) {
      const uint32_t low = self_data.transpose ? element[i][2 * t][g] : element[i][g][2 * t];
      const uint32_t high = self_data.transpose ? element[i][2 * t + 1][g] : element[i][g][2 * t + 1];
      self_data.fragment[i] = low | high << 16;
    }
  }
}

// ---- mma.sync ----

namespace {

struct Operands {
  float a[16][16], b[16][8], d[16][8];
};

template <class T>
float upper_or_lower(uint32_t pair, int upper) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * upper))});
}

template <class T>
void unpack_pairs(Operands& m, const MmaData& lane, int g, int t) {
  for (int h = 0; h < 2; ++h) {
    m.a[g][2 * t + h] = upper_or_lower<T>(lane.a[0], h);
    m.a[g + 8][2 * t + h] = upper_or_lower<T>(lane.a[1], h);
    m.a[g][2 * t + 8 + h] = upper_or_lower<T>(lane.a[2], h);
    m.a[g + 8][2 * t + 8 + h] = upper_or_lower<T>(lane.a[3], h);
    m.b[2 * t + h][g] = upper_or_lower<T>(lane.b[0], h);
    m.b[2 * t + 8 + h][g] = upper_or_lower<T>(lane.b[1], h);
  }
}

float truncate_tf32(uint32_t bits, const Site& site) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (finite && (bits & 0x1fffu) != 0)
    report(false, site, "mma: a TF32 operand was not rounded (round_tf32)");
  return bits_float(bits & 0xffffe000u);
}

void unpack_tf32(Operands& m, const MmaData& lane, int g, int t, const Site& site) {
  m.a[g][t] = truncate_tf32(lane.a[0], site);
  m.a[g + 8][t] = truncate_tf32(lane.a[1], site);
  m.a[g][t + 4] = truncate_tf32(lane.a[2], site);
  m.a[g + 8][t + 4] = truncate_tf32(lane.a[3], site);
  m.b[t][g] = truncate_tf32(lane.b[0], site);
  m.b[t + 4][g] = truncate_tf32(lane.b[1], site);
}

void multiply(Operands& m, int depth) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) m.d[row][column] += m.a[row][k] * m.b[k][column];
    }
  }
}

}  // namespace

void mma(Warp&, uint32_t lanes, void* const* data, const Site& site) {
  require_whole_warp("mma.sync", lanes, site);
  const MmaType type = static_cast<MmaData*>(data[0])->type;
  Operands m;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& self = *static_cast<MmaData*>(data[lane]);
    const int g = lane / 4, t = lane % 4;
    if (type == MmaType::kTf32) unpack_tf32(m, self, g, t, site);
    if (type == MmaType::kBFloat16) unpack_pairs<BFloat16>(m, self, g, t);
    if (type == MmaType::kFloat16) unpack_pairs<Half>(m, self, g, t);
    for (int h = 0; h < 4; ++h) m.d[g + h / 2 * 8][2 * t + h % 2] = self.d[h];
  }
  multiply(m, type == MmaType::kTf32 ? 8 : 16);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < 4; ++h) static_cast<MmaData*>(data[lane])->d[h] = m.d[g + h / 2 * 8][2 * t + h % 2];
  }
}

}  // namespace cuda_cnn::emulation
