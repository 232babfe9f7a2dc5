// The extension module: facts about the build and the processor, no tensors. The operators register
// themselves with torch's dispatcher when it loads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "eager.h"
#include "ops/allocate.h"
#include "ops/build_note.h"

namespace {

using cuda_cnn::cpu::Isa;

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (cuda_cnn::cpu::isa_available(isa)) names.push_back(cuda_cnn::cpu::isa_name(isa));
  }
  return names;
}

void set_isa(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == cuda_cnn::cpu::isa_name(isa) && cuda_cnn::cpu::set_isa(isa)) return;
  }
  throw std::invalid_argument("instruction set " + name + " is not in this build or not in this processor");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
#if defined(CUDA_CNN_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def(
      "cpu_isa", [] { return cuda_cnn::cpu::isa_name(cuda_cnn::cpu::isa()); }, "The instruction set in use.");
  m.def("cpu_isas", &available_isas, "The instruction sets that both the build and this processor have.");
  m.def("set_cpu_isa", &set_isa, pybind11::arg("name"), "For tests: the instruction set from now on.");
  m.def("num_threads", &cuda_cnn::cpu::num_threads, "Threads that a kernel may use.");
  m.def(
      "empty_cache", &cuda_cnn::ops::empty_cache,
      R"(Gives the system back the memory that CPU results have left: it is kept for the next ones, about the most
that results have taken at once. Results in use are not touched. (For a GPU: torch.cuda.empty_cache.))");
  m.def(
      "set_build_note", [](const std::string& note) { cuda_cnn::build_note() = note; },
      pybind11::arg("note"));
  // A submodule's functions take no part in pybind11's argument handling, which costs a microsecond.
  pybind11::module_ eager = m.def_submodule("eager", "Operators called with plain arguments alone.");
  for (PyMethodDef* methods : {cuda_cnn::eager::operator_methods(), cuda_cnn::eager::fuse_methods(),
                               cuda_cnn::eager::vector_methods()}) {
    if (PyModule_AddFunctions(eager.ptr(), methods) < 0) throw pybind11::error_already_set();
  }
}
