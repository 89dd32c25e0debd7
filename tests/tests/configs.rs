//! Every file in `configs/` loads, and every bad input is refused as a whole, with one sentence that names the place and the remedy.

use std::path::{Path, PathBuf};

use ringway::control::config::Config;
use ringway::control::cpu::HostCpus;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

fn host() -> HostCpus {
    HostCpus::of_size(8)
}

/// Why a text is refused.
fn why(text: &str) -> String {
    let sentence = Config::parse(text, "r.toml", &host())
        .expect_err(text)
        .to_string();
    assert!(!sentence.contains('\n'), "one sentence: {sentence}");
    assert!(
        sentence.starts_with("r.toml:"),
        "names the place: {sentence}"
    );
    sentence
}

fn port(name: &str, more: &str) -> String {
    format!(
        "[[port]]\nname = \"{name}\"\ntype = \"vhost-user\"\nsocket = \"/run/{name}\"\n{more}\n"
    )
}

#[test]
fn every_file_in_configs_loads() {
    let files: Vec<PathBuf> = std::fs::read_dir(configs())
        .expect("the directory is there")
        .map(|file| file.expect("readable").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let config = Config::load(&file, &host()).unwrap_or_else(|error| panic!("{error}"));
        assert!(!config.ports.is_empty(), "{} shows a port", file.display());
        let again = Config::parse(&config.to_toml(), "again", &host());
        assert_eq!(
            again,
            Ok(config),
            "{} survives a round trip",
            file.display()
        );
    }
}

#[test]
fn all_options_has_every_key_and_explains_it() {
    let text = std::fs::read_to_string(configs().join("all-options.toml")).expect("readable");
    let config = Config::load(&configs().join("all-options.toml"), &host()).expect("legal");
    // What a full configuration writes has every key there is.
    for line in config
        .to_toml()
        .lines()
        .filter_map(|line| line.split_once(" = "))
    {
        let key = line.0;
        let mut lines = text.lines().zip(text.lines().skip(1));
        let explained = lines.any(|(before, line)| {
            line.starts_with(&format!("{key} = "))
                && (before.starts_with('#') || !before.is_empty())
        });
        assert!(explained, "{key} is missing or not explained");
    }
    // An unknown key lists those there are: the file has all of them.
    let known = why(&port("a", "colour = 1"));
    let keys = known
        .split_once("a port has ")
        .expect("a list")
        .1
        .split('"')
        .skip(1)
        .step_by(2);
    for key in keys {
        assert!(
            text.lines()
                .any(|line| line.starts_with(&format!("{key} = "))),
            "{key} is missing"
        );
    }
}

#[test]
fn the_smallest_file_is_loaded_on_every_host() {
    let one_cpu = HostCpus::of_size(1);
    Config::load(&configs().join("two-containers.toml"), &one_cpu).expect("needs nothing special");
}

#[test]
fn the_unit_starts_and_reloads_with_commands_that_exist() {
    let unit = std::fs::read_to_string(configs().join("ringway.service")).expect("readable");
    for line in [
        "ExecStart=/usr/bin/ringway run --config",
        "ExecReload=/usr/bin/ringway reload",
        "Type=notify",
    ] {
        assert!(unit.lines().any(|found| found.starts_with(line)), "{line}");
    }
}

#[test]
fn refuses_what_is_no_toml_with_its_line() {
    assert!(why("idle = \"poll\"\nworkers = [1,\n").starts_with("r.toml:2: this is not TOML: "));
    assert!(why("idle = \"poll\"\nidle = \"poll\"\n").starts_with("r.toml:2: this is not TOML: "));
    assert!(why("= 1").starts_with("r.toml:1: "));
}

#[test]
fn refuses_unknown_keys_and_suggests_the_near_one() {
    assert_eq!(
        why("\n\nidel = \"poll\""),
        "r.toml:3: unknown key \"idel\": did you mean \"idle\"?"
    );
    assert_eq!(
        why("[fdb]\nages = 3"),
        "r.toml:2: unknown key \"ages\": did you mean \"age\"?"
    );
    assert_eq!(
        why("[[ports]]\nname = \"a\""),
        "r.toml:1: unknown key \"ports\": did you mean \"port\"?"
    );
    assert_eq!(
        why(&port("a", "queue = 1")),
        "r.toml:5: unknown key \"queue\": did you mean \"queues\"?"
    );
    assert!(
        why("colour = 1")
            .starts_with("r.toml:1: unknown key \"colour\": the file has \"workers\", \"idle\"")
    );
}

#[test]
fn refuses_wrong_values_and_says_what_to_write() {
    let wrong = [
        (
            "idle = \"pol\"",
            "r.toml:1: idle cannot be \"pol\": did you mean \"poll\"?",
        ),
        (
            "idle = \"fast\"",
            "r.toml:1: idle cannot be \"fast\": write \"poll\" or \"adaptive\"",
        ),
        (
            "idle = true",
            "r.toml:1: idle cannot be a boolean: write \"poll\" or \"adaptive\"",
        ),
        (
            "workers = 0",
            "r.toml:1: workers cannot be 0: write a number from 1 to 1024 workers, or a list of CPUs",
        ),
        (
            "workers = []",
            "r.toml:1: workers cannot be a list: write a list of CPU numbers like [2, 3] (2+3 on a command line)",
        ),
        (
            "workers = [2, 2]",
            "r.toml:1: workers names CPU 2 twice: write each CPU once",
        ),
        (
            "api = \"api.sock\"",
            "r.toml:1: api \"api.sock\" is relative: write the whole path, from / on",
        ),
        (
            "api-mode = 660",
            "r.toml:1: api-mode cannot be 660: write octal permission bits in quotes, like \"0660\"",
        ),
        (
            "[fdb]\ncapacity = 1000001",
            "r.toml:2: capacity cannot be 1000001: write a number from 64 to 1000000 stations",
        ),
        (
            "[fdb]\nage = -1",
            "r.toml:2: age cannot be -1: write a number from 0 to 1000000 seconds (0: never)",
        ),
        (
            "[fdb]\ncapacity = 100\nreserved = 101",
            "r.toml:3: reserved is 101 stations for each port, but the table holds 100: lower it, or raise capacity",
        ),
        (
            "fdb = 3",
            "r.toml:1: fdb must be one table: write [fdb] on a line of its own",
        ),
        (
            "[port]\nname = \"a\"",
            "r.toml:1: port must be a list of tables: write [[port]] above each port",
        ),
        (
            "port = [1]",
            "r.toml:1: port must be a list of tables: write [[port]] above each port",
        ),
        ("[idle]\nx = 1", "r.toml:1: idle is no table: write a value"),
    ];
    for (text, sentence) in wrong {
        assert_eq!(why(text), sentence);
    }
}

#[test]
fn refuses_wrong_ports_by_name() {
    let wrong = [
        (
            "queues = 17",
            "r.toml:5: port \"a\": queues cannot be 17: write a number from 1 to 16 queue pairs",
        ),
        (
            "queues = \"2\"",
            "r.toml:5: port \"a\": queues cannot be \"2\": write a number from 1 to 16 queue pairs",
        ),
        (
            "mtu = 67",
            "r.toml:5: port \"a\": mtu cannot be 67: write a number from 68 to 65535 bytes",
        ),
        (
            "mode = \"listen\"",
            "r.toml:5: port \"a\": mode cannot be \"listen\": write \"server\" or \"client\"",
        ),
        (
            "hugepages = \"require\"",
            "r.toml:5: port \"a\": hugepages cannot be \"require\": did you mean \"required\"?",
        ),
        (
            "socket-mode = \"rw\"",
            "r.toml:5: port \"a\": socket-mode cannot be \"rw\": write octal permission bits in quotes, like \"0660\"",
        ),
        (
            "workers = [1]",
            "r.toml:1: port \"a\": workers names CPUs, but the switch chooses its own: set the top-level workers = [1]",
        ),
    ];
    for (line, sentence) in wrong {
        assert_eq!(why(&port("a", line)), sentence);
    }
    assert_eq!(
        why("[[port]]\nname = \"a\"\ntype = \"ixgbevf\"\n"),
        "r.toml:3: port \"a\": type \"ixgbevf\" is not a type of port: this build has \"vhost-user\""
    );
    assert!(why("[[port]]\ntype = \"vhost-user\"\n").starts_with("r.toml:1: name is missing"));
    let long = format!(
        "[[port]]\nname = \"a\"\ntype = \"vhost-user\"\nsocket = \"/{}\"\n",
        "x".repeat(107)
    );
    assert_eq!(
        why(&long),
        "r.toml:4: port \"a\": socket is 108 bytes long and sockets allow 107: use a shorter directory"
    );
}

#[test]
fn refuses_names_and_sockets_that_are_taken() {
    assert_eq!(
        why(&(port("a", "") + &port("a", ""))),
        "r.toml:6: port \"a\" is there already: give each port its own name"
    );
    let same_socket = port("b", "").replace("/run/b", "/run//a");
    assert_eq!(
        why(&(port("a", "") + &same_socket)),
        "r.toml:6: port \"b\": socket /run//a is port \"a\"'s already: give each port its own socket"
    );
    assert_eq!(
        why(&("api = \"/run/a\"\n".to_owned() + &port("a", ""))),
        "r.toml:2: port \"a\": socket /run/a is the control socket's: give the port its own (api at r.toml:1)"
    );
}

#[test]
fn refuses_cpus_that_are_not_there_or_not_allowed() {
    assert_eq!(
        why("workers = [1, 8]"),
        "r.toml:1: workers names CPU 8, but this host has CPUs 0, 1, 2, 3, 4, 5, 6, 7: name some of those"
    );
    let mut narrow = host();
    narrow.allowed = [1, 2].into();
    let refuse = |text: &str| {
        Config::parse(text, "r.toml", &narrow)
            .expect_err(text)
            .to_string()
    };
    assert_eq!(
        refuse("workers = [1, 3]"),
        "r.toml:1: workers names CPU 3, but the cgroup cpuset allows CPUs 1, 2 only: name some of those, or widen the cpuset"
    );
    assert_eq!(
        refuse("workers = 3"),
        "r.toml:1: workers asks for 3 workers, but this process may use CPUs 1, 2 only: ask for at most 2"
    );
    assert_eq!(
        why(&("workers = [1]\n".to_owned() + &port("a", "workers = [2]"))),
        "r.toml:2: port \"a\": workers names CPU 2, but no worker runs there: the workers are on CPU 1"
    );
}

#[test]
fn names_the_file_that_cannot_be_read() {
    let sentence = Config::load(Path::new("/nowhere/r.toml"), &host())
        .expect_err("not there")
        .to_string();
    assert!(
        sentence.starts_with("/nowhere/r.toml: cannot be read: "),
        "{sentence}"
    );
}
