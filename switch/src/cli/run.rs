//! `ringway run`: the switch itself.

use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use log::{error, info, warn};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::lines::Lines;
use super::port::absolute_socket;
use crate::control::api::{Origin, Reload, reload};
use crate::control::config::{Config, ConfigError, Workers};
use crate::control::cpu::{self, HostCpus};
use crate::control::sandbox::{self, Mode};
use crate::control::serve::{Api, ApiSettings};
use crate::control::socket::make_dir;
use crate::control::spec::{list, parse_port};
use crate::control::state::{Idle, SocketMode};
use crate::control::switch::Switch;
use crate::port::call;
use crate::virtio::guest_mem::can_arm;

/// What to run.
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C and SIGTERM end it, SIGHUP loads the configuration file again (as `ringway reload` does). RUST_LOG=debug logs more.

Examples:
  ringway run --config /etc/ringway/ringway.toml
  ringway run --config ringway.toml --check
  ringway run --cpus 2,3 --idle adaptive --port vhost-user:blue,socket=/run/r/blue.sock --port vhost-user:red,socket=/run/r/red.sock")]
pub(super) struct RunArgs {
    /// Configuration file; configs/all-options.toml explains every key.
    #[arg(long, short, value_name = "FILE", conflicts_with_all = ["workers", "cpus", "idle", "ports"])]
    config: Option<PathBuf>,
    /// Number of workers, on CPUs that Ringway chooses: isolated ones first, CPU 0 last.
    #[arg(long, value_name = "NUMBER", conflicts_with = "cpus", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// CPUs of the workers, one worker each.
    #[arg(long, value_name = "CPU,CPU,...", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// What workers do when there is nothing to do.
    #[arg(long, value_enum)]
    idle: Option<IdleArg>,
    /// A port; `ringway port add --help` lists its keys.
    #[arg(long = "port", value_name = "TYPE:NAME,KEY=VALUE,...")]
    ports: Vec<String>,
    /// A directory below which ports may have their sockets, also those that are added later; given once for each. The
    /// directories of the control socket and of the ports it starts with are always among them.
    #[arg(long = "socket-dir", value_name = "DIR")]
    socket_dirs: Vec<PathBuf>,
    /// What the process gives up when it starts.
    #[arg(long, value_enum, default_value_t)]
    sandbox: SandboxArg,
    /// Only check the configuration.
    #[arg(long)]
    check: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum IdleArg {
    /// Poll on: lowest latency, a whole CPU per worker.
    Poll,
    /// Sleep after a while without frames, wake on a kick or a timer.
    Adaptive,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum SandboxArg {
    /// Capabilities, system calls (seccomp) and files (Landlock) that the switch does not need.
    #[default]
    On,
    /// The same, and any call that is not listed kills it: for tests.
    Strict,
    /// Nothing: for debuggers.
    Off,
}

pub(super) fn run(args: &RunArgs, api: Option<&Path>) -> anyhow::Result<()> {
    let host = HostCpus::read(Path::new("/"));
    let mut config = wanted(args, &host)?;
    config.listen_at(match api {
        Some(api) => std::path::absolute(api)?,
        None => config.api_path(),
    })?;
    let cpus = config.worker_cpus(&host);
    if args.check {
        let text = format!(
            "fine: {} ports, workers on {}\n",
            config.ports.len(),
            list(&cpus)
        );
        return Ok(std::io::stdout().write_all(text.as_bytes())?);
    }
    let lines = Lines::new();
    log_to(lines.clone());
    // Before anything starts, so that no signal finds nobody at home.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    // Whatever else this process does, it does beside its workers.
    if let Err(refused) = cpu::keep_to(&host.housekeeping(&cpus)) {
        info!("{refused}");
    }
    let file = args
        .config
        .as_deref()
        .map(std::path::absolute)
        .transpose()?;
    let origin = Origin {
        file,
        api_given: api.is_some(),
    };
    give_up(args, &config, file_dir(origin.file.as_deref()))?;
    lines.start(std::io::stderr())?;
    let ended = serve(config, &cpus, origin, &mut signals);
    lines.finish();
    ended
}

/// Runs the switch until it is told to end.
fn serve(
    config: Config,
    cpus: &[usize],
    origin: Origin,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let settings = ApiSettings {
        path: config.api_path(),
        mode: config.api_mode.unwrap_or(ApiSettings::MODE),
        owner: config.api_owner,
        origin: origin.clone(),
    };
    // The socket first: if another switch has it, nothing of that one is touched.
    let waiting = Api::listen(settings)?;
    let ports = config.ports.len();
    let switch = Switch::start(config, cpus)?;
    let api = match waiting.serve(switch.clone()) {
        Ok(api) => api,
        Err(error) => {
            switch.stop();
            return Err(error.into());
        }
    };
    info!(
        "{} ports, workers on {}, control socket {}",
        ports,
        list(cpus),
        api.path().display()
    );
    tell_systemd("READY=1");
    let obeyed = obey(signals, &switch, &origin);
    tell_systemd("STOPPING=1");
    drop(api);
    switch.stop();
    obeyed
}

/// The directory of a file that may be read again.
fn file_dir(file: Option<&Path>) -> Option<PathBuf> {
    Some(file?.parent()?.to_owned())
}

/// Gives up what the switch does not need. From here on threads may start.
fn give_up(args: &RunArgs, config: &Config, readable: Option<PathBuf>) -> anyhow::Result<()> {
    // What is opened once, before nothing more can be.
    if let Err(error) = call::prepare() {
        warn!(
            "no guest can be called: this host has no kernel AIO for us ({error}): guests that poll are served, others hear of no \
             frame; see `ringway doctor`"
        );
    }
    if !can_arm() {
        warn!(
            "no userfaultfd: a hole in a guest's memory is filled on the account of this process; see `ringway doctor --security`"
        );
    }
    let mode = match args.sandbox {
        SandboxArg::On => Mode::On,
        SandboxArg::Strict => Mode::Strict,
        SandboxArg::Off => Mode::Off,
    };
    let listening = config
        .ports
        .iter()
        .filter(|port| port.mode == SocketMode::Server);
    let sockets = listening
        .map(|port| port.socket.clone())
        .chain([config.api_path()]);
    let mut dirs: Vec<PathBuf> = sockets
        .filter_map(|socket| Some(socket.parent()?.to_owned()))
        .collect();
    for dir in &args.socket_dirs {
        dirs.push(std::path::absolute(dir)?);
    }
    dirs.sort();
    dirs.dedup();
    // Only what is there can be kept.
    for dir in &dirs {
        make_dir(dir)?;
    }
    sandbox::enter(mode, dirs, readable.as_slice());
    Ok(())
}

/// Reloads at SIGHUP until SIGINT or SIGTERM; the second of those ends the process at once.
fn obey(signals: &mut Signals, switch: &Switch, origin: &Origin) -> anyhow::Result<()> {
    for signal in signals.forever() {
        if signal != SIGHUP {
            let at_once = Arc::new(AtomicBool::new(true));
            signal_hook::flag::register_conditional_shutdown(SIGINT, 1, at_once.clone())?;
            signal_hook::flag::register_conditional_shutdown(SIGTERM, 1, at_once)?;
            info!("stopping");
            break;
        }
        match reload(switch, origin, &Reload::default()) {
            Ok(applied) => {
                let done = if applied.actions.is_empty() {
                    "nothing to do".to_owned()
                } else {
                    applied.actions.join(", ")
                };
                info!("reload: {done}; {} ports unchanged", applied.unchanged);
            }
            Err(refusal) => error!("reload: {refusal}"),
        }
    }
    Ok(())
}

fn wanted(args: &RunArgs, host: &HostCpus) -> anyhow::Result<Config> {
    if let Some(file) = &args.config {
        return Ok(Config::load(file, host)?);
    }
    let here = std::env::current_dir()?;
    let port = |(at, text): (usize, &String)| {
        let at = format!("--port {}", at + 1);
        let spec = parse_port(&absolute_socket(text, &here), &at)?;
        Ok((at, spec))
    };
    let ports = args
        .ports
        .iter()
        .enumerate()
        .map(port)
        .collect::<Result<Vec<_>, ConfigError>>()?;
    let workers = match (args.workers, args.cpus.as_slice()) {
        (Some(count), _) => Workers::Count(count.into()),
        (None, []) => Workers::default(),
        (None, cpus) => Workers::Cpus(cpus.to_vec()),
    };
    let idle = match args.idle {
        Some(IdleArg::Adaptive) => Idle::Adaptive,
        Some(IdleArg::Poll) | None => Idle::Poll,
    };
    Ok(Config::from_flags(workers, idle, ports, host)?)
}

fn log_to(lines: Lines) {
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    // The journal has times and levels of its own.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.format(|out, record| {
            let level = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            writeln!(out, "<{level}>{}", record.args())
        });
    } else {
        builder.format_target(false);
    }
    builder.target(env_logger::Target::Pipe(Box::new(lines)));
    // Refused only where a logger is there already: tests.
    let _ = builder.try_init();
}

/// sd_notify(3): tells systemd, if it asked to be told.
fn tell_systemd(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let bytes = path.as_encoded_bytes();
    let sent = UnixDatagram::unbound().and_then(|socket| match bytes.strip_prefix(b"@") {
        Some(name) => {
            let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name)?;
            socket.send_to_addr(state.as_bytes(), &address)
        }
        None => socket.send_to(state.as_bytes(), &path),
    });
    if let Err(refused) = sent {
        error!("systemd was not told {state}: {refused}: is Type=notify set without NotifyAccess?");
    }
}
