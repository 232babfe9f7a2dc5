// The short ways from Python to the operators (eager.cpp) and to a fused graph's layers (eager_fuse.cpp).
#pragma once

#include <Python.h>

namespace cuda_cnn::eager {

PyMethodDef* operator_methods();
PyMethodDef* fuse_methods();

}  // namespace cuda_cnn::eager
