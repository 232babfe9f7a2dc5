"""The operators: fake kernels, autograd Functions and public functions, one module each."""
