//! Configuration files and port texts: refused in a sentence, or read, and then read back as the same.
#![no_main]

use ringway::control::config::Config;
use ringway::control::cpu::HostCpus;
use ringway::control::spec::{parse_port, port_from_json};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let host = HostCpus::of_size(4);
    if let Ok(config) = Config::parse(text, "fuzz.toml", &host) {
        let again = Config::parse(&config.to_toml(), "again.toml", &host);
        assert_eq!(again.as_ref(), Ok(&config), "{}", config.to_toml());
    }
    if let Ok(spec) = parse_port(text, "fuzz") {
        let json = serde_json(&spec);
        assert_eq!(port_from_json(&json, "again"), Ok(spec));
    }
});

fn serde_json(spec: &ringway::control::state::PortSpec) -> serde_json::Value {
    serde_json::to_value(spec).expect("plain data")
}
