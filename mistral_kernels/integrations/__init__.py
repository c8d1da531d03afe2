"""Where other libraries plug these kernels in; each module needs the library it is named after."""
