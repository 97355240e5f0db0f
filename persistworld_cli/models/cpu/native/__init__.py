"""Kernels in C++ for CPUs with AVX-512, compiled when they are first needed; without them torch's own are used."""
