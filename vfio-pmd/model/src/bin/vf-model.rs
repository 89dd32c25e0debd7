//! `vf-model serve`: Virtual Functions on vfio-user sockets, steered by lines on standard input.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use vf_model::serve::{Served, serve_vf, tend};
use vf_model::{Api, Config, Inject, Nic, Pace, PfPolicy, Wire};

/// A model of the Intel 82599's Virtual Functions, for drivers to be tested against.
#[derive(Parser)]
#[command(name = "vf-model", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves VFs on vfio-user sockets until standard input ends.
    ///
    /// QEMU 10.1 or newer takes one with: -device '{"driver":"vfio-user-pci","socket":{"path":"PATH","type":"unix"}}'; the
    /// guest's memory must be a memory-backend-memfd with share=on.
    #[command(after_help = COMMANDS)]
    Serve(Serve),
}

const COMMANDS: &str = "\
Commands, one per line on standard input; each is answered by lines that end in `ok` or `error: ...`:
  show                     counters, drops, faults and misuses of every VF
  conversation VF          mailbox messages since the last time
  cable on|off             plugs the cable in or out
  reset-pf MILLISECONDS    resets the PF
  trust VF on|off          changes the PF's policy (also: spoofchk, link)
  inject VF WHAT [N]       lose-answers N, refuse N, delay MILLISECONDS, busy-mailbox N, lose-cts, queues N,
                           no-done on|off, length N (one frame), no-end N, removed on|off, near-wrap
  quit";

#[derive(clap::Args)]
struct Serve {
    /// A VF: PATH[,mac=02:..][,trust][,spoofchk=off][,vlan=N][,query-rss][,link=off]; once per VF
    #[arg(long = "vf", value_name = "SPEC", required = true)]
    vfs: Vec<Served>,
    /// What the port is connected to: tap:NAME, listen:PATH or connect:PATH
    #[arg(long)]
    wire: Option<String>,
    /// MTU of the PF
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(68..=9710))]
    mtu: u32,
    /// Queues the PF grants a VF
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    queues: u32,
    /// Queues over which the PF spreads received frames
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    rss: u32,
    /// Newest mailbox protocol of the PF: 1.0 to 1.5
    #[arg(long, default_value = "1.4", value_parser = api)]
    api: Api,
}

fn api(text: &str) -> Result<Api, String> {
    Ok(match text {
        "1.0" => Api::V10,
        "1.1" => Api::V11,
        "1.2" => Api::V12,
        "1.3" => Api::V13,
        "1.4" => Api::V14,
        "1.5" => Api::V15,
        _ => return Err("known are 1.0 to 1.5".to_owned()),
    })
}

fn main() -> std::process::ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let Command::Serve(arguments) = Arguments::parse().command;
    match serve(arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vf-model: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Serve) -> Result<()> {
    if arguments.vfs.len() > 63 {
        bail!("{} VFs: the device has 63", arguments.vfs.len());
    }
    let nic = Nic::new(Config {
        pf: PfPolicy {
            api: arguments.api,
            mtu: arguments.mtu,
            queues: arguments.queues,
            rss_queues: arguments.rss,
            ..PfPolicy::default()
        },
        vfs: arguments.vfs.iter().map(|vf| vf.policy.clone()).collect(),
        pace: Pace::AtOnce,
        manual_clock: false,
        dirty: true,
    });
    for (number, vf) in arguments.vfs.iter().enumerate() {
        serve_vf(Arc::clone(&nic), number, &vf.path)?;
    }
    let wire = arguments.wire.as_deref().map(wire).transpose()?;
    tend(Arc::clone(&nic), wire)?;
    println!("serving {} VFs", arguments.vfs.len());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["quit"] {
            break;
        }
        match command(&nic, &words) {
            Ok(()) => println!("ok"),
            Err(error) => println!("error: {error:#}"),
        }
    }
    for vf in &arguments.vfs {
        let _ = std::fs::remove_file(&vf.path);
    }
    Ok(())
}

fn wire(text: &str) -> Result<Wire> {
    let (kind, name) = text.split_once(':').unwrap_or((text, ""));
    let path = PathBuf::from(name);
    let made = match kind {
        "tap" => Wire::tap(name),
        "listen" => Wire::accept(&path),
        "connect" => Wire::connect(&path),
        _ => bail!("wire `{text}`: known are tap:NAME, listen:PATH and connect:PATH"),
    };
    made.with_context(|| format!("wire `{text}`"))
}

fn command(nic: &Nic, words: &[&str]) -> Result<()> {
    match words {
        [] => {}
        ["show"] => (0..nic.vfs()).for_each(|vf| show(nic, vf)),
        ["conversation", vf] => {
            for exchange in nic.take_conversation(number(nic, vf)?) {
                println!("{exchange}");
            }
        }
        ["cable", on] => nic.set_cable(switch(on)?),
        ["reset-pf", time] => nic.reset_pf(Duration::from_millis(time.parse()?)),
        ["trust", vf, on] => {
            let on = switch(on)?;
            nic.set_policy(number(nic, vf)?, |policy| policy.trusted = on);
        }
        ["spoofchk", vf, on] => {
            let on = switch(on)?;
            nic.set_policy(number(nic, vf)?, |policy| policy.spoof_check = on);
        }
        ["link", vf, on] => {
            let on = switch(on)?;
            nic.set_policy(number(nic, vf)?, |policy| policy.link_enabled = on);
        }
        ["inject", vf, what @ ..] => nic.inject(number(nic, vf)?, injection(what)?),
        _ => bail!("`{}`: see vf-model serve --help", words.join(" ")),
    }
    Ok(())
}

fn injection(words: &[&str]) -> Result<Inject> {
    Ok(match words {
        ["lose-answers", n] => Inject::LoseAnswers(n.parse()?),
        ["refuse", n] => Inject::Refuse(n.parse()?),
        ["delay", time] => Inject::Delay(Duration::from_millis(time.parse()?)),
        ["busy-mailbox", n] => Inject::BusyMailbox(n.parse()?),
        ["lose-cts"] => Inject::LoseCts,
        ["queues", n] => Inject::Queues(n.parse()?),
        ["no-done", on] => Inject::NoDone(switch(on)?),
        ["length", n] => Inject::ReceiveLength(1, n.parse()?),
        ["no-end", n] => Inject::NoEnd(n.parse()?),
        ["removed", on] => Inject::Removed(switch(on)?),
        ["near-wrap"] => Inject::CountersNearWrap,
        _ => bail!("inject `{}`: see vf-model serve --help", words.join(" ")),
    })
}

fn number(nic: &Nic, text: &str) -> Result<usize> {
    let vf: usize = text
        .parse()
        .with_context(|| format!("`{text}` is no number of a VF"))?;
    if vf >= nic.vfs() {
        bail!("VF {vf}: there are {}", nic.vfs());
    }
    Ok(vf)
}

fn switch(text: &str) -> Result<bool> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bail!("`{text}`: on or off"),
    }
}

/// One line of `key=value` per VF, then a line per fault and misuse.
fn show(nic: &Nic, vf: usize) {
    let (counters, drops, report) = (nic.counters(vf), nic.drops(vf), nic.report(vf));
    println!(
        "vf={vf} rx_frames={} rx_bytes={} tx_frames={} tx_bytes={} mappings={} resets={} faults={} misuses={} interrupts={:?}",
        counters.rx_frames,
        counters.rx_bytes,
        counters.tx_frames,
        counters.tx_bytes,
        nic.mappings(vf),
        report.resets,
        report.faults.len(),
        report.misuses.len(),
        nic.interrupts(vf),
    );
    println!("vf={vf} drops: {drops:?}");
    report
        .faults
        .iter()
        .for_each(|fault| println!("vf={vf} fault: {fault:x?}"));
    report
        .misuses
        .iter()
        .for_each(|misuse| println!("vf={vf} misuse: {misuse:x?}"));
}
