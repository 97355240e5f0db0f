"""Kernels in C++ for CPUs with AVX2 or AVX-512, compiled when first needed; elsewhere torch's are used."""
