//! Nothing that a worker runs can panic, nor take memory: read off the release binary itself.
//!
//! A panic on a worker is an outage of everybody, and no test of behaviour proves that there is none. So this disassembles the program
//! that is shipped, follows every call and jump from the worker's loop and from all queues it can call through a trait, and finds no
//! way to the panics of the standard library nor to the allocator, but for the few ways named in [`ALLOWED`], each with its reason. What
//! the optimiser could not prove to be impossible is found here, however it was inlined.
//!
//! Needs `target/release/ringway` (`tests/run` builds it first) and binutils.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use testkit::process::target_dir;
use testkit::skip::{Missing, tool};

/// Where a worker's code begins: its loop, and all that it calls through a trait. Each must be met in the binary. A network card's
/// registers are memory; those of a model behind a socket are not (`vfio_pmd::vfio_user` sends messages, takes memory, may block): that
/// way is for tests and is left out.
const ROOTS: &[&str] = &[
    "ringway::dataplane::worker::Worker::work",
    "<ringway::port::vhost::FromGuest as ringway::dataplane::queue::RxQueue>::",
    "<ringway::port::ixgbevf::FromWire as ringway::dataplane::queue::RxQueue>::",
    "<ringway::port::shared::Shared<S> as ringway::dataplane::queue::TxQueue>::send",
    "<ringway::port::doze::Bed as ringway::dataplane::worker::Doze>::",
];

/// How the standard library panics, and what it does when memory is short.
const PANICS: &[&str] = &[
    "core::panicking",
    "core::slice::index::slice_index_fail",
    "core::slice::copy_from_slice",
    "core::option::unwrap_failed",
    "core::option::expect_failed",
    "core::result::unwrap_failed",
    "core::cell::panic",
    "core::str::slice_error_fail",
    "core::slice::sort",
    "alloc::raw_vec::handle_error",
    "alloc::raw_vec::capacity_overflow",
    "alloc::alloc::handle_alloc_error",
    "alloc::vec::",
    "std::panicking",
    "std::thread::local::panic",
];

/// The allocator, to take memory. To give it back is no panic, and waits for nobody.
const TAKES_MEMORY: &[&str] = &["malloc", "calloc", "realloc", "posix_memalign"];

/// Ways to a panic that stay: the function that calls it, what it calls, and why no guest and no frame gets there.
const ALLOWED: &[(&str, &str, &str)] = &[];

/// The program's functions and who calls whom.
#[derive(Default)]
struct Calls {
    names: HashMap<u64, String>,
    /// Caller to callees, each with the address of the call.
    of: HashMap<u64, Vec<(u64, u64)>>,
}

fn output(program: &str, arguments: &[&str], binary: &Path) -> Result<String> {
    let ended = Command::new(program)
        .args(arguments)
        .arg(binary)
        .output()
        .with_context(|| program.to_owned())?;
    ensure!(ended.status.success(), "{program}: {}", ended.status);
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits.trim_start_matches("0x"), 16).ok()
}

/// `<name+0x12>`, or `<name@GLIBC_2.2.5>`: the name.
fn symbol(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('<')?;
    rest.strip_suffix(":").unwrap_or(rest).strip_suffix('>')
}

impl Calls {
    fn of_binary(binary: &Path) -> Result<Calls> {
        let mut calls = Calls::default();
        // Calls out of a crate go through a table that the loader fills: its entries by address.
        let relocations = output("readelf", &["-r", "-W"], binary)?;
        let mut table = HashMap::new();
        for line in relocations.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [at, _, "R_X86_64_RELATIVE" | "R_AARCH64_RELATIVE", to] = words[..]
                && let (Some(at), Some(to)) = (hex(at), hex(to))
            {
                table.insert(at, to);
            }
        }
        let listing = output("objdump", &["-d", "-C", "--no-show-raw-insn"], binary)?;
        let mut here = 0;
        for line in listing.lines() {
            if let Some((at, _)) = line.split_once(" <").filter(|_| line.ends_with(">:")) {
                here = hex(at).context("an address")?;
                let name = symbol(line).context("a name")?;
                calls.names.insert(here, name.to_owned());
            } else if let Some((at, to, name)) = target(line, &table) {
                if let Some(name) = name {
                    calls.names.entry(to).or_insert(name);
                }
                calls.of.entry(here).or_default().push((at, to));
            }
        }
        Ok(calls)
    }

    fn roots(&self, of: &str) -> Vec<u64> {
        let named = |name: &str| name == of || of.ends_with("::") && name.starts_with(of);
        let found = self.names.iter().filter(|(_, name)| named(name));
        found.map(|(at, _)| *at).collect()
    }

    /// Every function that can be reached, with who was seen calling it; not beyond those that `end` names.
    fn reach(&self, roots: &[u64], end: impl Fn(&str) -> bool) -> BTreeMap<u64, Vec<(u64, u64)>> {
        let mut found: BTreeMap<u64, Vec<(u64, u64)>> =
            roots.iter().map(|root| (*root, Vec::new())).collect();
        let mut open = roots.to_vec();
        while let Some(caller) = open.pop() {
            for (at, callee) in self.of.get(&caller).into_iter().flatten() {
                let Some(name) = self.names.get(callee) else {
                    continue; // a jump within the function
                };
                if *callee == caller {
                    continue;
                }
                let known = found.contains_key(callee);
                found.entry(*callee).or_default().push((caller, *at));
                if !known && !end(name) {
                    open.push(*callee);
                }
            }
        }
        found
    }

    fn name(&self, at: u64) -> &str {
        self.names.get(&at).map_or("?", String::as_str)
    }
}

/// The instruction's address, and the function that it calls, jumps to or takes the address of (or something that is no function); its name if it is another library's.
fn target(line: &str, table: &HashMap<u64, u64>) -> Option<(u64, u64, Option<String>)> {
    let (at, rest) = line.trim_start().split_once(":\t")?;
    let (operation, operand) = rest.split_once(char::is_whitespace)?;
    let branches =
        operation.starts_with('j') || operation.starts_with("call") || operation.starts_with("lea");
    if !branches {
        return None;
    }
    let at = hex(at)?;
    // Behind `#` stands where an operand relative to the instruction pointer is.
    if let Some((_, place)) = operand.split_once('#') {
        let (to, name) = place.trim().split_once(' ')?;
        let place = hex(to)?;
        // Not only calls: the table's entry may be loaded first and called later, from a register.
        if !operation.starts_with("lea")
            && let Some(to) = table.get(&place)
        {
            return Some((at, *to, None));
        }
        let foreign = symbol(name).and_then(|name| name.split_once('@'));
        return Some((at, place, foreign.map(|(name, _)| name.to_owned())));
    }
    let branches = operation.starts_with('j') || operation.starts_with("call");
    let to = hex(operand.trim().split_once(' ')?.0).filter(|_| branches)?;
    Some((at, to, None))
}

fn one_of(name: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn ends(name: &str) -> bool {
    // Vectors panic in functions of their own, which the optimiser leaves alone.
    one_of(name, PANICS) && (!name.starts_with("alloc::vec::") || name.contains("assert_failed"))
        || TAKES_MEMORY.contains(&name)
}

/// Where in the sources a call is.
fn place(binary: &Path, at: u64) -> String {
    let arguments = ["-i", "-p", "-e"];
    let found = Command::new("addr2line")
        .args(arguments)
        .arg(binary)
        .arg(format!("{at:#x}"))
        .output();
    let text = found.map_or_else(
        |_| String::new(),
        |found| String::from_utf8_lossy(&found.stdout).into_owned(),
    );
    let short = |line: &str| {
        let line = line.replace("(inlined by)", "");
        let from = ["/switch/", "/vfio-pmd/", "/library/", "/registry/src/"]
            .iter()
            .find_map(|part| line.find(part));
        line[from.unwrap_or(0)..].trim().to_owned()
    };
    text.lines().map(short).collect::<Vec<_>>().join(" < ")
}

/// The program that is shipped.
fn shipped() -> PathBuf {
    target_dir().join("release/ringway")
}

/// Whether it is there, with what it takes to read it.
fn readable(binary: &Path) -> Result<(), Missing> {
    tool("objdump", "binutils")?;
    tool("readelf", "binutils")?;
    let missing = || {
        Missing::new(
            "there is no release build",
            "cargo build --release --bin ringway",
        )
    };
    binary.is_file().then_some(()).ok_or_else(missing)
}

#[test]
fn no_worker_can_panic_nor_take_memory() -> Result<()> {
    let binary = shipped();
    testkit::require!(readable(&binary));
    let calls = Calls::of_binary(&binary)?;
    let mut roots = Vec::new();
    for root in ROOTS {
        let found = calls.roots(root);
        ensure!(!found.is_empty(), "{root} is not in {}", binary.display());
        roots.extend(found);
    }
    let reached = calls.reach(&roots, ends);
    ensure!(reached.len() > 40, "only {} functions", reached.len());

    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for (end, callers) in reached.iter().filter(|(at, _)| ends(calls.name(**at))) {
        for (caller, at) in callers {
            let (caller, end) = (calls.name(*caller), calls.name(*end));
            let allowed = ALLOWED
                .iter()
                .position(|(by, what, _)| caller.contains(by) && end.contains(what));
            match allowed {
                Some(index) => drop(used.insert(index)),
                None => wrong.push(format!(
                    "{caller}\n    to {end}\n    {}",
                    place(&binary, *at)
                )),
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "a worker can come to:\n{}",
        wrong.join("\n")
    );
    for (index, (by, what, _)) in ALLOWED.iter().enumerate() {
        ensure!(used.contains(&index), "{by} does not call {what} any more");
    }
    Ok(())
}

#[test]
fn a_way_to_a_panic_is_found_where_there_is_one() -> Result<()> {
    let binary = shipped();
    testkit::require!(readable(&binary));
    let calls = Calls::of_binary(&binary)?;
    let reached = calls.reach(
        &calls.roots("ringway::control::config::Config::parse"),
        ends,
    );
    let found: BTreeSet<&str> = reached
        .keys()
        .map(|at| calls.name(*at))
        .filter(|name| ends(name))
        .collect();
    for wanted in ["core::panicking", "core::option::", "malloc"] {
        ensure!(
            found.iter().any(|name| name.starts_with(wanted)),
            "{wanted} is not among {found:?}"
        );
    }
    Ok(())
}
