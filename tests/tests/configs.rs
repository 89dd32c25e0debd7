//! Every file in `configs/` loads, and every bad input is refused as a whole, with one sentence that names the place and the remedy.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringway::control::config::Config;
use ringway::control::cpu::HostCpus;
use testkit::require;
use testkit::skip::tool;

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
fn the_units_start_and_reload_with_commands_that_exist() {
    for (unit, config) in [
        ("ringway.service", "/etc/ringway"),
        ("ringway-user.service", "%h/.config/ringway"),
    ] {
        let unit = std::fs::read_to_string(configs().join(unit)).expect("readable");
        for line in [
            &format!("ExecStart=/usr/bin/ringway run --config {config}/ringway.toml"),
            "ExecReload=/usr/bin/ringway reload",
            "Type=notify",
            "NoNewPrivileges=yes",
        ] {
            assert!(unit.lines().any(|found| found == line), "{line}");
        }
    }
}

/// Runs systemd-analyze; what it said, if it was content.
fn analyze(arguments: &[&str]) -> String {
    let home = tempfile::tempdir().expect("a directory");
    let output = Command::new("systemd-analyze")
        .args(arguments)
        .env("XDG_RUNTIME_DIR", home.path())
        .output()
        .expect("ran");
    let (said, refused) = (output.stdout, output.stderr);
    let text = String::from_utf8_lossy(&said).into_owned();
    let refused = String::from_utf8_lossy(&refused).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{refused}");
    text + &refused
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units_and_little_exposed() {
    require!(tool("systemd-analyze", "systemd"));
    let dir = tempfile::tempdir().expect("a directory");
    for (unit, manager) in [
        ("ringway.service", "--system"),
        ("ringway-user.service", "--user"),
    ] {
        // The program need not be installed here, nor the manual.
        let text = std::fs::read_to_string(configs().join(unit)).expect("readable");
        let path = dir.path().join(unit);
        std::fs::write(&path, text.replace("/usr/bin/ringway", "/bin/true")).expect("written");
        let said = analyze(&["verify", "--man=no", manager, &path.display().to_string()]);
        assert!(!said.contains(unit), "{said}");
    }
    let path = configs().join("ringway.service").display().to_string();
    let said = analyze(&["security", "--no-pager", "--offline=true", &path]);
    let (_, level) = said
        .rsplit_once("exposure level for ringway.service: ")
        .expect("a verdict");
    let level: f32 = level
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .expect("a number");
    assert!(level <= 1.5, "{said}");
}

/// The calls of a list in the switch's own filters.
fn calls(list: &str) -> BTreeSet<String> {
    let lists = configs().join("../switch/src/control/sandbox/x86_64.json");
    let lists = std::fs::read_to_string(lists).expect("readable");
    let lists: serde_json::Value = serde_json::from_str(&lists).expect("JSON");
    let filter = lists[list]["filter"].as_array().expect("a list");
    filter
        .iter()
        .map(|rule| rule["syscall"].as_str().expect("a name").to_owned())
        .collect()
}

/// The calls that a word of `SystemCallFilter=` stands for.
fn expand(word: &str) -> BTreeSet<String> {
    if !word.starts_with('@') {
        return BTreeSet::from([word.to_owned()]);
    }
    let said = analyze(&["syscall-filter", "--no-pager", word]);
    let lines = said
        .lines()
        .skip(1)
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(expand).collect()
}

#[test]
fn the_units_allow_every_call_that_the_switch_makes() {
    require!(tool("systemd-analyze", "systemd"));
    for unit in ["ringway.service", "ringway-user.service"] {
        let text = std::fs::read_to_string(configs().join(unit)).expect("readable");
        let mut allowed = BTreeSet::new();
        for words in text
            .lines()
            .filter_map(|line| line.strip_prefix("SystemCallFilter="))
        {
            let (refuse, words) = words
                .strip_prefix('~')
                .map_or((false, words), |words| (true, words));
            for call in words.split_whitespace().flat_map(expand) {
                if refuse {
                    allowed.remove(&call);
                } else {
                    allowed.insert(call);
                }
            }
        }
        let wanted = &calls("control") | &calls("worker");
        let lacking: Vec<_> = wanted.difference(&allowed).collect();
        assert!(lacking.is_empty(), "{unit} lacks {lacking:?}");
    }
}

#[test]
fn the_docker_profile_allows_every_call_that_the_switch_makes_and_none_of_an_intruders() {
    let text = std::fs::read_to_string(configs().join("docker-seccomp.json")).expect("readable");
    let profile: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let names = profile["syscalls"][0]["names"].as_array().expect("a list");
    let allowed: BTreeSet<String> = names
        .iter()
        .map(|name| name.as_str().expect("a name").to_owned())
        .collect();
    let wanted = &calls("control") | &calls("worker");
    let lacking: Vec<_> = wanted.difference(&allowed).collect();
    assert!(lacking.is_empty(), "{lacking:?}");
    // A container begins with an execve; the switch gives that up by itself.
    let mut intruders = calls("intruder");
    intruders.remove("execve");
    let beyond: Vec<_> = intruders.intersection(&allowed).collect();
    assert!(beyond.is_empty(), "{beyond:?}");
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
        "r.toml:1: port \"a\": device is missing: a port needs the PCI address of a VF like device = \"0000:81:10.0\""
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
