#include "kernels/concat.h"

#include <vector>

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

constexpr const char* kOp = "concat";
constexpr unsigned kFew = 8;  // inputs; room for more comes from the heap

// torch.cat passes over these whatever the other shapes are.
bool is_legacy_empty(const at::Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == 0; }

// The dimensions from slowest to fastest in memory.
at::DimVector memory_order(int64_t rank, at::MemoryFormat format) {
  at::DimVector order;
  for (int64_t i = 0; i < rank; ++i) order.push_back(i);
  if (is_channels_last(format)) {
    order.erase(order.begin() + 1);
    order.push_back(1);
  }
  return order;
}

// torch.cat's rule: channels_last where every input suggests it.
at::MemoryFormat common_format(at::TensorList tensors) {
  const at::MemoryFormat first = format_of(tensors[0]);
  for (const at::Tensor& tensor : tensors) {
    if (format_of(tensor) != first) return at::MemoryFormat::Contiguous;
  }
  return first;
}

// A tensor as rows: the dimensions order[0 … split) count them, the others are one run of bytes.
struct Rows {
  int64_t count = 1;
  int64_t bytes = 0;
  int64_t stride = 0;   // in bytes
  bool regular = true;  // one stride reaches every row, and a row is dense
};

Rows rows_of(const at::Tensor& tensor, at::IntArrayRef order, int64_t split) {
  Rows rows;
  int64_t dense = 1;
  for (int64_t k = tensor.dim() - 1; k >= split; --k) {
    const int64_t size = tensor.size(order[k]);
    rows.regular &= size == 1 || tensor.stride(order[k]) == dense;
    dense *= size;
  }
  int64_t stride = -1;
  for (int64_t k = split - 1; k >= 0; --k) {
    const int64_t size = tensor.size(order[k]);
    if (size == 1) continue;
    if (stride < 0) stride = tensor.stride(order[k]);
    rows.regular &= tensor.stride(order[k]) == stride * rows.count;
    rows.count *= size;
  }
  rows.bytes = dense * tensor.element_size();
  rows.stride = max64(stride, 0) * tensor.element_size();
  return rows;
}

// The largest power of two up to 16 that divides everything the kernel adds to an address.
int64_t common_alignment(const ConcatParams& params) {
  uint64_t bits = 16 | reinterpret_cast<uint64_t>(params.output) | params.row_stride;
  for (int64_t k = 0; k < params.count; ++k) {
    const ConcatPart& part = params.parts[k];
    bits |= reinterpret_cast<uint64_t>(part.data) | part.bytes | part.row_stride | part.offset;
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

// Copies the tensors side by side along order[split] into rows of `output`.
void copy_rows(at::TensorList tensors, at::Tensor& output, at::IntArrayRef order, int64_t split,
               at::MemoryFormat format) {
  const Rows target = rows_of(output, order, split);
  std::vector<at::Tensor> copies;
  c10::SmallVector<ConcatPart, kFew> parts;
  int64_t offset = 0;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    Rows rows = rows_of(tensor, order, split);
    const bool regular = rows.regular;
    if (!regular) {
      copies.push_back(tensor.contiguous(format));
      rows = rows_of(copies.back(), order, split);
    }
    parts.push_back({data(regular ? tensor : copies.back()), rows.bytes, rows.stride, offset});
    offset += rows.bytes;
  }
  if (parts.empty()) return;
  ConcatParams params{parts.data(), static_cast<int64_t>(parts.size()), mutable_data(output), target.count,
                      target.stride};
  params.alignment = common_alignment(params);
  CUDA_CNN_LAUNCH(output, concat, params);
}

void check_sizes(const at::Tensor& tensor, const at::Tensor& first, int64_t dim, int64_t number) {
  TORCH_CHECK(tensor.dim() == first.dim(), kOp, ": Tensors must have same number of dimensions: got ",
              first.dim(), " and ", tensor.dim());
  for (int64_t k = 0; k < first.dim(); ++k) {
    TORCH_CHECK(k == dim || tensor.size(k) == first.size(k), kOp,
                ": Sizes of tensors must match except in dimension ", dim, ". Expected size ", first.size(k),
                " but got size ", tensor.size(k), " for tensor number ", number, " in the list.");
  }
}

at::Tensor concat(at::TensorList tensors, int64_t dim) {
  TORCH_CHECK_VALUE(!tensors.empty(), kOp, ": expected a non-empty list of Tensors");
  const at::Tensor* first = nullptr;
  at::DimVector shape = {0};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    TORCH_CHECK(tensor.layout() == at::kStrided, kOp, ": expected dense (strided) tensors, got ",
                tensor.layout());
    TORCH_CHECK(tensor.dim() > 0, kOp, ": zero-dimensional tensor (at position ", i,
                ") cannot be concatenated");
    check_like(kOp, "every tensor", tensor, tensors[0]);
    if (is_legacy_empty(tensor)) continue;
    if (first == nullptr) {
      first = &tensor;
      dim = at::maybe_wrap_dim(dim, tensor.dim());
      shape = at::DimVector(tensor.sizes());
      shape[dim] = 0;
    }
    check_sizes(tensor, *first, dim, i);
    shape[dim] += tensor.size(dim);
  }
  const at::MemoryFormat format = common_format(tensors);
  at::Tensor output = empty_result(shape, tensors[0].options().memory_format(format));
  if (output.numel() == 0) return output;
  const at::DimVector order = memory_order(output.dim(), format);
  const int64_t split = std::find(order.begin(), order.end(), dim) - order.begin();
  copy_rows(tensors, output, order, split, format);
  return output;
}

// Of x's kind, NHWC, with `channels` channels, nothing in them yet.
at::Tensor channel_buffer(const at::Tensor& x, int64_t channels) {
  check_dim("channel_buffer", "x", x, 4);
  return empty_result({x.size(0), channels, x.size(2), x.size(3)},
                      x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// buffer[:, start : start + C] = x, for a buffer that is dense in either layout.
void write_channels_(at::Tensor& buffer, const at::Tensor& x, int64_t start) {
  constexpr const char* kName = "write_channels_";
  TORCH_CHECK(buffer.dim() >= 2, kName, ": expected buffer of 2 or more dimensions, got ", buffer.dim(),
              " (shape ", buffer.sizes(), ")");
  check_dim(kName, "x", x, buffer.dim());
  check_like(kName, "x", x, buffer);
  for (int64_t k = 0; k < x.dim(); ++k) {
    TORCH_CHECK(k == 1 || x.size(k) == buffer.size(k), kName, ": expected x of shape ", buffer.sizes(),
                " but for its channels, got ", x.sizes());
  }
  TORCH_CHECK(start >= 0 && start <= buffer.size(1) - x.size(1), kName, ": channels ", start, " to ",
              start + x.size(1), " do not lie in a buffer of ", buffer.size(1));
  if (x.numel() == 0) return;
  const at::MemoryFormat format = format_of(buffer);
  TORCH_CHECK(buffer.is_contiguous(format), kName, ": expected a dense buffer, contiguous or channels_last");
  at::Tensor slice = buffer.narrow(1, start, x.size(1));
  const at::DimVector order = memory_order(buffer.dim(), format);
  if (!buffer.is_inference()) buffer.unsafeGetTensorImpl()->bump_version();  // autograd sees the change
  copy_rows({x}, slice, order, is_channels_last(format) ? buffer.dim() - 1 : 1, format);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(library, "concat(Tensor[] tensors, int dim) -> Tensor", &concat);
  define(library, "channel_buffer(Tensor x, int channels) -> Tensor", &channel_buffer);
  define(library, "write_channels_(Tensor(a!) buffer, Tensor x, int start) -> ()", &write_channels_);
}

}  // namespace cuda_cnn::ops
