//! Reads a [`PortSpec`] from the keys of a `[[port]]` table, from `type:name,key=value,...`, or from a JSON object: the same keys
//! and the same sentences everywhere.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use super::config::FDB_CAPACITY_MAX;
use super::keys::{ConfigError, Entry, Raw, check_keys, did_you_mean, quoted};
use super::state::{
    Hugepages, MTU_MAX, Owner, Permissions, PortKind, PortSpec, QUEUES_MAX, SocketMode,
};
use crate::dataplane::eth::Mac;

/// Bytes of a path that fit into `sockaddr_un` with the NUL that other programs expect there.
pub const SOCKET_PATH_MAX: usize = 107;
/// Smallest MTU IPv4 lives with (RFC 791).
const MTU_MIN: u32 = 68;
/// Addresses a port can be locked to: each source that is not known is compared with all of them.
const MACS_MAX: usize = 16;
/// Longest name of a port or bridge: it has to fit into tables, labels and file names.
const NAME_MAX: usize = 32;

const KEYS: [&str; 18] = [
    "name",
    "type",
    "socket",
    "device",
    "vfio-user",
    "mode",
    "queues",
    "bridge",
    "mtu",
    "hugepages",
    "socket-mode",
    "socket-owner",
    "peer-uid",
    "mac",
    "stations",
    "moves",
    "floods",
    "workers",
];
const TYPES: [(&str, PortKind); 2] = [
    ("vhost-user", PortKind::VhostUser),
    ("ixgbevf", PortKind::Ixgbevf),
];

/// Reads `vhost-user:blue,socket=/run/r/blue.sock,queues=2`. `at` names the place for refusals, like `--port 1`.
pub fn parse_port(text: &str, at: &str) -> Result<PortSpec, ConfigError> {
    let refusal = |why: &str| {
        ConfigError(format!(
            "{at}: {text:?} {why}: write type:name,key=value like vhost-user:blue,socket=/run/r/blue.sock"
        ))
    };
    let mut parts = text.split(',');
    let head = parts.next().unwrap_or_default();
    let (kind, name) = head
        .split_once(':')
        .ok_or_else(|| refusal("names no type and name"))?;
    let entry = |key: &str, value: &str| Entry {
        at: at.to_owned(),
        key: key.to_owned(),
        value: Raw::Text(value.to_owned()),
    };
    let mut entries = vec![entry("type", kind), entry("name", name)];
    for part in parts {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| refusal(&format!("has {part:?} without a value")))?;
        entries.push(entry(key, value));
    }
    port_from_entries(&entries, at)
}

/// Reads a JSON object with the keys of a `[[port]]` table.
pub fn port_from_json(value: &serde_json::Value, at: &str) -> Result<PortSpec, ConfigError> {
    let object = value.as_object().ok_or_else(|| {
        ConfigError(format!("{at}: the body is no JSON object: send {{\"name\": ..., \"type\": \"vhost-user\", \"socket\": ...}}"))
    })?;
    let entries: Vec<Entry> = object
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| Entry {
            at: at.to_owned(),
            key: key.clone(),
            value: raw_json(value),
        })
        .collect();
    port_from_entries(&entries, at)
}

fn raw_json(value: &serde_json::Value) -> Raw {
    match value {
        serde_json::Value::String(text) => Raw::Str(text.clone()),
        serde_json::Value::Number(number) => number
            .as_i64()
            .map_or(Raw::Other("such a number"), Raw::Int),
        serde_json::Value::Array(items) => Raw::List(items.iter().map(raw_json).collect()),
        serde_json::Value::Bool(_) => Raw::Other("a boolean"),
        serde_json::Value::Object(_) => Raw::Other("an object"),
        serde_json::Value::Null => Raw::Other("null"),
    }
}

/// Reads the keys of one port. `at` is the place of the port as a whole.
pub(crate) fn port_from_entries(entries: &[Entry], at: &str) -> Result<PortSpec, ConfigError> {
    check_keys(entries, &KEYS, "a port")?;
    let find = |key: &str| entries.iter().find(|entry| entry.key == key);
    let need = |key: &str, example: &str| {
        find(key)
            .ok_or_else(|| ConfigError(format!("{at}: {key} is missing: a port needs {example}")))
    };
    let name = read_name(need("name", "a name like name = \"blue\"")?)?;
    // From here on a refusal says which port it is about.
    let named = |entry: &Entry| Entry {
        at: format!("{}: port {name:?}", entry.at),
        ..entry.clone()
    };
    let at = format!("{at}: port {name:?}");
    let need = |key: &str, example: &str| {
        find(key)
            .map(named)
            .ok_or_else(|| ConfigError(format!("{at}: {key} is missing: a port needs {example}")))
    };
    let kind = read_type(&need("type", "type = \"vhost-user\"")?)?;
    match kind {
        PortKind::VhostUser => {
            need(
                "socket",
                "a path like socket = \"/run/ringway/ports/blue/vhost.sock\"",
            )?;
        }
        PortKind::Ixgbevf => {
            if find("vfio-user").is_none() {
                need(
                    "device",
                    "the PCI address of a VF like device = \"0000:81:10.0\"",
                )?;
            }
        }
    }
    let mut spec = PortSpec {
        kind,
        ..PortSpec::vhost_user(name.clone(), "")
    };
    for entry in entries {
        set(&mut spec, &named(entry))?;
    }
    for key in ["socket-mode", "socket-owner"] {
        if let (Some(entry), SocketMode::Client) = (find(key), spec.mode) {
            return Err(named(entry).refuse("is for mode = \"server\" only: with \"client\" the guest makes the socket and sets it"));
        }
    }
    check_kind(&spec, find).map_err(|(entry, why)| named(entry).refuse(why))?;
    Ok(spec)
}

/// Refuses keys that say nothing to this type of port.
fn check_kind<'a>(
    spec: &PortSpec,
    find: impl Fn(&str) -> Option<&'a Entry>,
) -> Result<(), (&'a Entry, &'static str)> {
    let refuse = |keys: &[&str], why| match keys.iter().find_map(|key| find(key)) {
        Some(entry) => Err((entry, why)),
        None => Ok(()),
    };
    if spec.kind == PortKind::VhostUser {
        return refuse(&["device", "vfio-user"], "is for type = \"ixgbevf\" only");
    }
    refuse(
        &["socket", "socket-mode", "socket-owner", "peer-uid"],
        "is for type = \"vhost-user\" only",
    )?;
    if spec.mode != SocketMode::default() {
        refuse(&["mode"], "is for type = \"vhost-user\" only")?;
    }
    if spec.hugepages != Hugepages::default() {
        refuse(&["hugepages"], "is for type = \"vhost-user\" only")?;
    }
    if spec.device.is_some() {
        refuse(
            &["vfio-user"],
            "stands beside device: a port has one of them",
        )?;
    }
    if ![1, 2, 4].contains(&spec.queues) {
        refuse(&["queues"], "of an uplink are 1, 2 or 4")?;
    }
    Ok(())
}

/// Reads `0000:81:10.0`: domain, bus, device and function, in hexadecimal.
fn read_pci_address(entry: &Entry) -> Result<String, ConfigError> {
    let remedy = "write the PCI address of a VF like \"0000:81:10.0\" (ls -l /sys/class/net/PF/device/virtfn*)";
    let text = entry.text(remedy)?;
    let shape = [4, 2, 2, 1];
    let mut parts = text.split([':', '.']);
    let hex = shape.iter().all(|digits| {
        parts.next().is_some_and(|part| {
            part.len() == *digits
                && part
                    .chars()
                    .all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c))
        })
    });
    if hex && parts.next().is_none() && text.as_bytes()[4] == b':' && text.as_bytes()[7] == b':' {
        return Ok(text.to_owned());
    }
    Err(entry.refuse(format_args!("cannot be {text:?}: {remedy}")))
}

fn set(spec: &mut PortSpec, entry: &Entry) -> Result<(), ConfigError> {
    match entry.key.as_str() {
        "socket" => {
            spec.socket = entry.path()?;
            check_socket_path(&spec.socket).map_err(|why| entry.refuse(why))?;
        }
        "device" => spec.device = Some(read_pci_address(entry)?),
        "vfio-user" => {
            let path = entry.path()?;
            check_socket_path(&path).map_err(|why| entry.refuse(why))?;
            spec.vfio_user = Some(path);
        }
        "mode" => {
            spec.mode = entry.choice(&[
                ("server", SocketMode::Server),
                ("client", SocketMode::Client),
            ])?
        }
        "queues" => spec.queues = entry.number(1..=i64::from(QUEUES_MAX), " queue pairs")? as u16,
        "bridge" => spec.bridge = read_name(entry)?,
        "mtu" => spec.mtu = entry.number(i64::from(MTU_MIN)..=i64::from(MTU_MAX), " bytes")? as u32,
        "hugepages" => {
            spec.hugepages =
                entry.choice(&[("any", Hugepages::Any), ("required", Hugepages::Required)])?;
        }
        "socket-mode" => spec.socket_mode = Some(Permissions(entry.permissions()?)),
        "socket-owner" => spec.socket_owner = Some(read_owner(entry, Path::new("/etc"))?),
        "peer-uid" => spec.peer_uid = Some(read_user(entry, Path::new("/etc"))?),
        "mac" => spec.mac = read_macs(entry)?,
        "stations" => {
            spec.stations = entry.number(1..=i64::from(FDB_CAPACITY_MAX), " stations")? as u32
        }
        "moves" => spec.moves = entry.number(1..=1_000_000, " stations a second")? as u32,
        "floods" => spec.floods = entry.number(1..=100_000_000, " frames a second")? as u32,
        "workers" => spec.workers = entry.cpus()?,
        _ => {} // name and type are read by now
    }
    Ok(())
}

fn read_type(entry: &Entry) -> Result<PortKind, ConfigError> {
    let names = TYPES.map(|(name, _)| name);
    let has = format!("this build has {}", quoted(&names));
    let text = entry.text(&has)?;
    match TYPES.iter().find(|(name, _)| *name == text) {
        Some((_, kind)) => Ok(*kind),
        None => {
            let remedy = did_you_mean(text, &names).unwrap_or(has);
            Err(entry.refuse(format_args!("{text:?} is not a type of port: {remedy}")))
        }
    }
}

fn read_name(entry: &Entry) -> Result<String, ConfigError> {
    let remedy = "write 1 to 32 letters, digits, '.', '_' or '-', a letter or digit first";
    let text = entry.text(remedy)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.len() <= NAME_MAX
        && text.chars().all(plain)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        Ok(text.to_owned())
    } else {
        Err(entry.refuse(format_args!("cannot be {text:?}: {remedy}")))
    }
}

/// What is wrong with a socket path, for `key path` sentences.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > SOCKET_PATH_MAX {
        return Err(format!(
            "is {bytes} bytes long and sockets allow {SOCKET_PATH_MAX}: use a shorter directory"
        ));
    }
    if !path.is_absolute() {
        return Err(format!(
            "{path:?} is relative: write the whole path, from / on"
        ));
    }
    if path.components().any(|part| part == Component::ParentDir)
        || path.as_os_str().as_bytes().contains(&0)
    {
        return Err(format!(
            "{path:?} has \"..\" or a NUL in it: write the path straight"
        ));
    }
    if path.file_name().is_none_or(OsStr::is_empty) || path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(format!(
            "{path:?} is a directory: name the socket in it, like {:?}",
            path.join("vhost.sock")
        ));
    }
    Ok(())
}

/// Reads `user:group`, `user` or `:group`, by number or by a name in `passwd` and `group` of `etc`.
pub(crate) fn read_owner(entry: &Entry, etc: &Path) -> Result<Owner, ConfigError> {
    let text =
        entry.text("write user:group, by name or number, like \"root:libvirt\" or \":1000\"")?;
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let id = |name: &str, file: &str| -> Result<Option<u32>, ConfigError> {
        if name.is_empty() {
            return Ok(None);
        }
        let known = name
            .parse()
            .ok()
            .or_else(|| id_by_name(&etc.join(file), name));
        known.map(Some).ok_or_else(|| {
            entry.refuse(format_args!(
                "names {name:?}, which is not in /etc/{file}: write a number, or add it there"
            ))
        })
    };
    let owner = Owner {
        uid: id(user, "passwd")?,
        gid: id(group, "group")?,
    };
    if owner
        == (Owner {
            uid: None,
            gid: None,
        })
    {
        return Err(entry.refuse("names neither a user nor a group: write user:group"));
    }
    Ok(owner)
}

/// Reads station addresses: one, a list, or several with `+` on a command line.
fn read_macs(entry: &Entry) -> Result<Vec<Mac>, ConfigError> {
    let remedy = "write an address like \"02:00:00:00:00:01\", or a list of up to 16 (with + on a command line)";
    let texts: Vec<&str> = match &entry.value {
        Raw::List(items) => {
            let texts: Option<Vec<&str>> = items.iter().map(text_of).collect();
            texts
                .filter(|texts| !texts.is_empty())
                .ok_or_else(|| entry.refuse(format_args!("cannot be a list of that: {remedy}")))?
        }
        Raw::Text(_) => entry.text(remedy)?.split('+').collect(),
        _ => vec![entry.text(remedy)?],
    };
    let mut macs = Vec::new();
    for text in texts {
        let mac: Mac = text
            .parse()
            .map_err(|why| entry.refuse(format_args!("names {why}")))?;
        if mac.is_multicast() || mac.is_zero() || macs.contains(&mac) || macs.len() == MACS_MAX {
            return Err(entry.refuse(format_args!(
                "cannot have {mac}: write each station's own address once, {MACS_MAX} at most"
            )));
        }
        macs.push(mac);
    }
    Ok(macs)
}

fn text_of(item: &Raw) -> Option<&str> {
    match item {
        Raw::Str(text) => Some(text),
        _ => None,
    }
}

/// Reads a user, by number or by a name in `passwd` of `etc`.
fn read_user(entry: &Entry, etc: &Path) -> Result<u32, ConfigError> {
    if let Raw::Int(number) = entry.value {
        let known = u32::try_from(number).ok();
        return known.ok_or_else(|| {
            entry.refuse(format_args!(
                "cannot be {number}: no user has such a number"
            ))
        });
    }
    let name = entry.text("write a user, by name or number, like \"dpdk\" or 1000")?;
    let known = name
        .parse()
        .ok()
        .or_else(|| id_by_name(&etc.join("passwd"), name));
    known.ok_or_else(|| {
        entry.refuse(format_args!(
            "names {name:?}, which is not in /etc/passwd: write a number, or add it there"
        ))
    })
}

/// The third field of the line of `file` whose first field is `name`: the id in both passwd(5) and group(5).
fn id_by_name(file: &Path, name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.find(|fields| fields.len() > 2 && fields[0] == name)?[2]
        .parse()
        .ok()
}

/// Refuses a port that cannot live beside `others`, or on workers with these CPUs (`None`: the CPUs are not known yet).
///
/// Names no place: whoever calls knows it.
pub fn check_beside<'a>(
    spec: &PortSpec,
    others: impl IntoIterator<Item = &'a PortSpec>,
    worker_cpus: Option<&[usize]>,
) -> Result<(), ConfigError> {
    let name = &spec.name;
    for other in others {
        if other.name == *name {
            return Err(ConfigError(format!(
                "port {name:?} is there already: give each port its own name"
            )));
        }
        // `Path` compares by component: /run//a and /run/./a are one.
        let same_socket = other.kind == spec.kind && other.socket == spec.socket;
        if same_socket && spec.kind == PortKind::VhostUser {
            let socket = spec.socket.display();
            let other = &other.name;
            return Err(ConfigError(format!(
                "port {name:?}: socket {socket} is port {other:?}'s already: give each port its own socket"
            )));
        }
        if other.place() == spec.place() {
            return Err(ConfigError(format!(
                "port {name:?}: {} is port {:?}'s already: give each port its own",
                spec.place(),
                other.name
            )));
        }
        let shared = spec.mac.iter().find(|mac| other.mac.contains(mac));
        if let (Some(mac), true) = (shared, other.bridge == spec.bridge) {
            let other = &other.name;
            return Err(ConfigError(format!(
                "port {name:?}: mac {mac} is port {other:?}'s already: give each port of a bridge its own addresses"
            )));
        }
    }
    let Some(cpus) = worker_cpus else {
        return Ok(());
    };
    match spec.workers.iter().find(|cpu| !cpus.contains(cpu)) {
        Some(cpu) => Err(ConfigError(format!(
            "port {name:?}: workers names CPU {cpu}, but no worker runs there: the workers are on {}",
            list(cpus)
        ))),
        None => Ok(()),
    }
}

/// `CPU 3`, `CPUs 2, 3`.
pub(crate) fn list<'a>(cpus: impl IntoIterator<Item = &'a usize>) -> String {
    let numbers: Vec<String> = cpus.into_iter().map(ToString::to_string).collect();
    format!(
        "CPU{} {}",
        if numbers.len() == 1 { "" } else { "s" },
        numbers.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        parse_port(text, "--port 1").expect_err(text).to_string()
    }

    #[test]
    fn reads_a_port_text_with_every_key() {
        let text = "vhost-user:blue,socket=/run/r/blue.sock,mode=server,queues=4,bridge=b1,mtu=9000,hugepages=required,\
                    socket-mode=0600,socket-owner=1000:2000,peer-uid=1000,mac=02:00:00:00:00:01+02:00:00:00:00:02,\
                    stations=8,moves=10,floods=5000,workers=2+3";
        let spec = parse_port(text, "--port 1").expect("legal");
        let wanted = PortSpec {
            queues: 4,
            bridge: "b1".into(),
            mtu: 9000,
            hugepages: Hugepages::Required,
            socket_mode: Some(Permissions(0o600)),
            socket_owner: Some(Owner {
                uid: Some(1000),
                gid: Some(2000),
            }),
            peer_uid: Some(1000),
            mac: vec![
                Mac::from_bytes([2, 0, 0, 0, 0, 1]),
                Mac::from_bytes([2, 0, 0, 0, 0, 2]),
            ],
            stations: 8,
            moves: 10,
            floods: 5000,
            workers: vec![2, 3],
            ..PortSpec::vhost_user("blue", "/run/r/blue.sock")
        };
        assert_eq!(spec, wanted);
    }

    #[test]
    fn reads_back_from_json_what_it_prints_as_json() {
        let text = "vhost-user:blue,socket=/b,mode=server,socket-mode=600,socket-owner=1000:2000,workers=2+3";
        let spec = parse_port(text, "--port 1").expect("legal");
        let json = serde_json::to_value(&spec).expect("plain data");
        assert_eq!(port_from_json(&json, "body"), Ok(spec));
    }

    #[test]
    fn refuses_what_is_no_port_text() {
        assert_eq!(
            refusal("blue"),
            "--port 1: \"blue\" names no type and name: write type:name,key=value like vhost-user:blue,socket=/run/r/blue.sock"
        );
        assert!(refusal("vhost-user:blue,socket").contains("has \"socket\" without a value"));
        assert_eq!(
            refusal("vhost-user:blue"),
            "--port 1: port \"blue\": socket is missing: a port needs a path like socket = \"/run/ringway/ports/blue/vhost.sock\""
        );
        assert_eq!(
            refusal("ixgbevf:uplink,socket=/a"),
            "--port 1: port \"uplink\": device is missing: a port needs the PCI address of a VF like device = \"0000:81:10.0\""
        );
        assert_eq!(
            refusal("vhost-user:b,sokcet=/a"),
            "--port 1: unknown key \"sokcet\": did you mean \"socket\"?"
        );
        assert!(refusal("vhost-user:b,socket=/a,socket=/b").contains("socket stands there twice"));
        assert_eq!(
            refusal("vhost-user:b,socket=/a,queues=17"),
            "--port 1: port \"b\": queues cannot be \"17\": write a number from 1 to 16 queue pairs"
        );
        assert!(refusal("vhost-user:b,socket=/a,mode=severs").contains("did you mean \"server\"?"));
        assert!(
            refusal("vhost-user:b,socket=a.sock").contains("is relative: write the whole path")
        );
        assert!(refusal("vhost-user:b,socket=/run/../a").contains("write the path straight"));
        assert!(
            refusal("vhost-user:b,socket=/run/a/")
                .contains("is a directory: name the socket in it")
        );
        assert!(refusal("vhost-user:../b,socket=/a").contains("write 1 to 32 letters"));
        assert!(
            refusal("vhost-user:b,socket=/a,mode=client,socket-mode=600")
                .contains("is for mode = \"server\" only")
        );
        assert!(
            refusal("vhost-user:b,socket=/a,socket-owner=nobody-has-this-name")
                .contains("not in /etc/passwd")
        );
        assert!(refusal("vhost-user:b,socket=/a,workers=1+1").contains("names CPU 1 twice"));
        let long = format!("vhost-user:b,socket=/{}", "x".repeat(107));
        assert!(
            refusal(&long)
                .contains("is 108 bytes long and sockets allow 107: use a shorter directory")
        );
    }

    #[test]
    fn finds_owners_by_name() {
        let etc = tempfile::tempdir().expect("a directory");
        std::fs::write(
            etc.path().join("passwd"),
            "root:x:0:0::/root:/bin/sh\nanna:x:1001:1001::/:/bin/sh\n",
        )
        .expect("written");
        std::fs::write(etc.path().join("group"), "kvm:x:104:anna\n").expect("written");
        let owner = |text: &str| {
            let entry = Entry {
                at: "t".into(),
                key: "socket-owner".into(),
                value: Raw::Str(text.into()),
            };
            read_owner(&entry, etc.path())
        };
        assert_eq!(
            owner("anna:kvm"),
            Ok(Owner {
                uid: Some(1001),
                gid: Some(104)
            })
        );
        assert_eq!(
            owner(":7"),
            Ok(Owner {
                uid: None,
                gid: Some(7)
            })
        );
        assert_eq!(
            owner("anna"),
            Ok(Owner {
                uid: Some(1001),
                gid: None
            })
        );
        assert!(owner(":").is_err());
        assert!(owner("kvm:anna").is_err());
    }

    #[test]
    fn refuses_a_name_or_socket_that_another_port_has() {
        let blue = PortSpec::vhost_user("blue", "/run/blue");
        let why = |spec: &PortSpec| {
            check_beside(spec, [&blue], Some(&[2, 3]))
                .expect_err("clash")
                .to_string()
        };
        assert!(
            why(&PortSpec::vhost_user("blue", "/run/other"))
                .contains("port \"blue\" is there already")
        );
        assert!(
            why(&PortSpec::vhost_user("red", "/run/./blue")).contains("is port \"blue\"'s already")
        );
        let pinned = PortSpec {
            workers: vec![4],
            ..PortSpec::vhost_user("red", "/run/red")
        };
        assert_eq!(
            why(&pinned),
            "port \"red\": workers names CPU 4, but no worker runs there: the workers are on CPUs 2, 3"
        );
    }
}
