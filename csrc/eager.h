// The short ways from Python to the operators (eager.cpp) to a fused graph's layers (eager_fuse.cpp), and
// loops over vectors (eager_vectors.cpp).
#pragma once

#include <Python.h>

namespace cuda_cnn::eager {

PyMethodDef* operator_methods();
PyMethodDef* fuse_methods();
PyMethodDef* vector_methods();

}  // namespace cuda_cnn::eager
