//! The tests are in `tests/`, one file per topic; see README.md.
