// The extension module: facts about the build, no tensors. The operators register themselves with torch when it loads.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
#ifdef CUDA_CNN_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
