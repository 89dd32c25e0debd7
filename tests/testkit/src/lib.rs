//! Shared pieces of the tests and benchmarks.
