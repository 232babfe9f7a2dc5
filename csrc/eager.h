// The short way from Python to the operators: see eager.cpp.
#pragma once

#include <Python.h>

namespace cuda_cnn {

PyMethodDef* eager_methods();

}  // namespace cuda_cnn
