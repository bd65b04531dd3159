"""Fast kernels, one to a file, each with its plain torch reference beside it. None imports a GPU package on a CPU."""
