// Why and when this build went without CUDA, for the error of a CUDA tensor. Python sets it when it loads the
// extension: compiled in, the date would rebuild every file each day.
#pragma once

#include <string>

namespace cuda_cnn {

inline std::string& build_note() {
  static std::string note;
  return note;
}

}  // namespace cuda_cnn
