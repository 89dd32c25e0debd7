//! The layout of the sources: which part may name which, and which words have no place near a packet.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// All Rust files below `dir` (relative to the repository), with their text.
fn sources(dir: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(at) = open.pop() {
        let Ok(entries) = fs::read_dir(&at) else {
            continue;
        };
        for entry in entries.map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                open.push(entry);
            } else if entry.extension().is_some_and(|ext| ext == "rs")
                && !entry.ends_with("tests.rs")
                && !entry.ends_with("model.rs")
            {
                let name = entry.strip_prefix(root()).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    assert!(
        !found.is_empty(),
        "{dir} has no sources: the layout has changed, change this test too"
    );
    found.sort();
    found
}

/// The lines of a file before its test module, numbered from 1, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line))
        .take_while(|(_, line)| {
            !line.starts_with("#[cfg(test)]") && !line.starts_with("#[cfg(all(test")
        })
        .map(|(number, line)| (number, line.split("//").next().unwrap_or("")))
}

/// Finds `words` in the code of `files`; gives a line for each.
fn find(files: &[(String, String)], words: &[&str]) -> Vec<String> {
    let mut hits = Vec::new();
    for (name, text) in files {
        for (number, line) in code(text) {
            hits.extend(
                words
                    .iter()
                    .filter(|word| line.contains(**word))
                    .map(|word| format!("{name}:{number}: {word}")),
            );
        }
    }
    hits
}

#[test]
fn parts_name_only_those_below_them() {
    let rules: &[(&str, &[&str])] = &[
        (
            "switch/src/dataplane",
            &[
                "crate::port",
                "crate::virtio",
                "crate::control",
                "crate::cli",
                "crate::guest",
            ],
        ),
        (
            "switch/src/virtio",
            &[
                "crate::port",
                "crate::dataplane",
                "crate::control",
                "crate::cli",
                "crate::guest",
            ],
        ),
        (
            "switch/src/port",
            &["crate::control", "crate::cli", "crate::guest"],
        ),
        (
            "switch/src/guest",
            &[
                "crate::port",
                "crate::dataplane",
                "crate::control",
                "crate::cli",
            ],
        ),
        ("switch/src/control", &["crate::cli", "crate::guest"]),
        ("vfio-pmd/src", &["ringway::"]),
    ];
    for (part, above) in rules {
        let hits = find(&sources(part), above);
        assert!(
            hits.is_empty(),
            "{part} must not name what is above it:\n{}",
            hits.join("\n")
        );
    }
}

#[test]
fn the_data_plane_does_not_allocate_block_log_or_call_the_kernel() {
    // Constructors allocate, once; these files are all that runs per turn.
    let words = [
        "std::fs",
        "std::net",
        "std::process",
        "println!",
        "log::",
        "format!(",
        ".lock()",
        ".unwrap()",
        ".expect(",
        "panic!(",
        "thread::sleep",
        "libc::",
        "rustix::",
    ];
    let files = sources("switch/src/dataplane");
    let hits = find(&files, &words);
    assert!(
        hits.is_empty(),
        "not on the packet path:\n{}",
        hits.join("\n")
    );
    let rings: Vec<_> = sources("switch/src/virtio")
        .into_iter()
        .filter(|(name, _)| {
            ["ring.rs", "buffers.rs", "split.rs", "packed.rs"]
                .iter()
                .any(|file| *name == format!("switch/src/virtio/{file}"))
        })
        .collect();
    assert_eq!(rings.len(), 4);
    let hits = find(&rings, &words);
    assert!(
        hits.is_empty(),
        "not on the packet path:\n{}",
        hits.join("\n")
    );
}

#[test]
fn unsafe_code_stays_on_its_islands() {
    let islands = [
        "switch/src/dataplane/clock.rs",
        "switch/src/dataplane/frame.rs",
        "switch/src/dataplane/fdb",
        "switch/src/virtio/",
        "switch/src/port/",
        "switch/src/control/peer_cred.rs",
        "switch/src/control/sandbox/kernel.rs",
        "switch/src/guest/",
        "vfio-pmd/benches/",
        "bench/src/kernel/socket.rs",
        "vfio-pmd/src/",
        "vfio-pmd/model/src/dma.rs",
        "vfio-pmd/model/src/wire.rs",
    ];
    for (name, text) in sources("switch/src")
        .iter()
        .chain(&sources("vfio-pmd"))
        .chain(&sources("bench/src"))
    {
        if text.contains("allow(unsafe_code)") {
            assert!(
                islands.iter().any(|island| name.starts_with(island)),
                "{name} is no island of unsafe code"
            );
        }
    }
}

#[test]
fn files_are_short_enough_to_be_read() {
    for dir in [
        "switch/src",
        "vfio-pmd/src",
        "vfio-pmd/model/src",
        "bench/src",
    ] {
        for (name, text) in sources(dir) {
            let lines = code(&text).count();
            assert!(
                lines <= 800,
                "{name}: {lines} lines above its tests: split it by question"
            );
        }
    }
}

#[test]
fn the_top_level_is_what_it_shall_be() {
    let expected = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "bench",
        "configs",
        "switch",
        "target",
        "tests",
        "vfio-pmd",
    ];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            name.starts_with('.') || expected.contains(&name.as_str()),
            "{name} does not belong at the top level"
        );
    }
}

#[test]
fn nothing_is_left_undone() {
    for dir in ["switch/src", "vfio-pmd/src", "bench", "tests"] {
        let marks = ["TODO", "FIXME", "XXX"].map(|mark| format!("{mark}:"));
        for (name, text) in sources(dir)
            .iter()
            .filter(|(name, _)| !name.ends_with("tidy.rs"))
        {
            for mark in &marks {
                assert!(
                    !text.contains(mark.as_str()),
                    "{name}: {mark} is for the issue tracker"
                );
            }
        }
    }
}
