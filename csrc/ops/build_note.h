// For two errors, what Python knows of this build: the code that it holds ("sm_80, sm_90a and no PTX") or,
// without CUDA, why and since when. Python sets it when it loads the extension: compiled in, the date would
// rebuild every file each day.
#pragma once

#include <string>

namespace cuda_cnn {

inline std::string& build_note() {
#if defined(CUDA_CNN_EMULATED)
  static std::string note = "the emulation's code";
#else
  static std::string note;
#endif
  return note;
}

}  // namespace cuda_cnn
