//! Measures vhost-user switches side by side.
fn main() {}
