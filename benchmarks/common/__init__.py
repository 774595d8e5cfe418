"""Shared by the benchmarks: cases, methods, and measurement in processes of their own."""
