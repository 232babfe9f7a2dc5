// Winograd's algorithm for filters with a stride (a network's first layer). The image is taken in blocks of
// stride_h x stride_w pixels, each a pixel of stride_h*stride_w*C channels ("space to depth"), and the
// filters in blocks of as many taps, the last ones filled up with 0: on those the stride is 1. 11x11 of
// stride 4 on 3 channels is 3x3 on 48: 108 products an output of F(4x4,3x3) where a direct sum takes 363. 7x7
// of stride 2 is 4x4 on 12: 48 of F(3x3,4x4) where it takes 147.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kCopySize = 1048576;  // of what is in blocks at once: it stays in L3
constexpr int64_t kCopyGrain = 16384;   // elements worth a second thread

// What is seen as blocks: position (p, q) is one, with its values in the order of a weight's taps. Behind
// each row are `spare` blocks of 0.
template <class T>
struct Blocks {
  Gather<T> gather;
  int64_t spare;

  int64_t row_size() const { return (gather.Q + spare) * gather.depth(); }
  int64_t image_size() const { return gather.P * row_size(); }

  // Rows [begin, end), counted through all images, to `out`, and up to a vector behind the last block.
  void copy(int64_t begin, int64_t end, T* out) const {
    for (int64_t row = begin; row < end; ++row, out += row_size()) {
      pack_positions(gather, row * gather.Q, gather.Q, 0, gather.depth(), out, gather.depth());
      for (int64_t i = gather.Q * gather.depth(); i < row_size(); ++i) out[i] = T{};
    }
  }
};

// Calls of stride 1, each for some images or, of large ones, for a band of rows.
// With room for filters in blocks, of F: the weight, or its gradient.
template <class T, class F>
class InBlocks {
 public:
  explicit InBlocks(const Conv2dParams& p, int64_t filter_sets = 1)
      : params_(p), call_(conv2d_in_blocks(p)), images_{forward_gather<T>(p), 0} {
    images_.gather.P = call_.H, images_.gather.Q = call_.W;
    images_.gather.R = p.stride_h, images_.gather.S = p.stride_w;
    images_.spare = ceil_div(kLanes<float>, call_.C);  // room for a vector: several threads copy rows
    call_.W += images_.spare;
    count_ = min64(max64(1, kCopySize / images_.image_size()), p.N);
    const int64_t tile = 7 - call_.R, rows = kCopySize / images_.row_size() - (call_.R - 1);
    band_ = images_.image_size() <= kCopySize ? p.P : min64(max64(1, rows / tile) * tile, p.P);
    filter_size_ = call_.K * call_.R * call_.S * call_.C;
    const int64_t elements = count_ * (band_ + call_.R - 1) * images_.row_size() + kLanes<T>;
    const int64_t size = ceil_div(elements * sizeof(T), 64) * 64;  // F is aligned, too
    const int64_t filters_size = sizeof(F) * (filter_sets * filter_size_ + kLanes<F>);
    char* memory = workspace<char>(Workspace::kBlocks, size + filters_size);
    memory_ = reinterpret_cast<T*>(memory), filters_ = reinterpret_cast<F*>(memory + size);
    call_.x = memory_;
  }

  F* filters() const { return filters_; }
  int64_t filter_size() const { return filter_size_; }

  // The weight in blocks: filters are images of R x S pixels.
  void copy_filters() {
    const Conv2dParams& p = params_;
    Conv2dParams weight{};
    weight.x = p.weight, weight.H = p.R, weight.W = p.S, weight.C = weight.x_pixel = p.C;
    weight.P = call_.R, weight.Q = call_.S, weight.R = p.stride_h, weight.S = p.stride_w;
    weight.stride_h = p.stride_h, weight.stride_w = p.stride_w;
    weight.dilation_h = weight.dilation_w = weight.groups = 1;
    Blocks<T>{forward_gather<T>(weight), 0}.copy(0, p.K * call_.R, filters());
    call_.weight = filters();
  }

  // body(call) in turn.
  template <class Body>
  void for_each(const Body& body) {
    const Conv2dParams& p = params_;
    for (int64_t n = 0; n < p.N; n += count_) {
      for (int64_t row = 0; row < p.P; row += band_) {
        call_.N = min64(count_, p.N - n), call_.P = min64(band_, p.P - row);
        call_.H = call_.P + call_.R - 1;
        copy_rows(n * images_.gather.P + row);
        const int64_t pixel = (n * p.P + row) * p.Q;
        if (p.y) call_.y = static_cast<T*>(p.y) + pixel * p.y_pixel;
        if (p.dy) call_.dy = static_cast<const T*>(p.dy) + pixel * p.y_pixel;
        if (p.residual) call_.residual = static_cast<const T*>(p.residual) + pixel * p.residual_pixel;
        body(static_cast<const Conv2dParams&>(call_));
      }
    }
  }

 private:
  // Those of the call, which follow one another: several images are whole.
  void copy_rows(int64_t first) {
    const int64_t row_size = images_.row_size();
    parallel_for(call_.N * call_.H, ceil_div(kCopyGrain, row_size), [&](int64_t begin, int64_t end) {
      images_.copy(first + begin, first + end, memory_ + begin * row_size);
    });
  }

  const Conv2dParams& params_;
  Conv2dParams call_;
  Blocks<T> images_;
  int64_t count_, band_, filter_size_;
  T* memory_;
  F* filters_;
};

}  // namespace

void forward_winograd_blocks(const Conv2dParams& p) {
  with_winograd_types(p.dtype, [&](auto type, auto) {
    using T = decltype(type);
    InBlocks<T, T> blocks(p);
    blocks.copy_filters();
    blocks.for_each([](const Conv2dParams& call) { forward_winograd(call); });
  });
}

void weight_grad_winograd_blocks(const Conv2dParams& p) {
  with_winograd_types(p.dtype, [&](auto type, auto) {
    using T = decltype(type);
    InBlocks<T, float> blocks(p, 2);
    float *const sums = blocks.filters(), *const more = sums + blocks.filter_size();
    bool first = true;
    blocks.for_each([&](const Conv2dParams& call) {
      weight_grad_winograd_sums<T>(call, first ? sums : more);
      for (int64_t i = 0; i < blocks.filter_size() && !first; ++i) sums[i] += more[i];
      first = false;
    });
    const Conv2dParams b = conv2d_in_blocks(p);
    T* to = static_cast<T*>(p.dweight);
    for (int64_t k = 0; k < p.K; ++k) {
      for (int64_t r = 0; r < p.R; ++r) {
        for (int64_t s = 0; s < p.S; ++s, to += p.C) {
          const int64_t block = (k * b.R + r / p.stride_h) * b.S + s / p.stride_w;
          const int64_t tap = r % p.stride_h * p.stride_w + s % p.stride_w;
          const float* from = sums + block * b.C + tap * p.C;
          for (int64_t c = 0; c < p.C; ++c) to[c] = cuda_cnn::narrow<T>(from[c]);
        }
      }
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
