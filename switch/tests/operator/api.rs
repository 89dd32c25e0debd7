//! The API over a real unix socket, asked by the real client.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::memory::{Memory, Running, start};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use ringway::cli::Client;
use ringway::control::api::{Reload, Removed, description};
use ringway::control::config::Config;
use ringway::control::serve::{Api, ApiSettings};
use ringway::control::state::{
    Applied, FdbPage, PortSpec, PortStatus, QueueMove, StatsReport, Version,
};
use serde_json::json;

fn client(running: &Running) -> Client {
    Client::new(running.api.path())
}

/// Status and sentence of a refusal.
fn refusal(client: &Client, method: Method, what: &str, body: &str) -> (u16, String) {
    let (status, body) = client
        .ask(method, what, Bytes::from(body.to_owned()))
        .expect("an answer");
    let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    (
        status.as_u16(),
        body["error"].as_str().expect("a sentence").to_owned(),
    )
}

#[test]
fn adds_lists_shows_moves_and_deletes_a_port() {
    let running = start(Memory::default());
    let client = client(&running);
    let spec = PortSpec {
        queues: 2,
        ..PortSpec::vhost_user("blue", "/run/blue")
    };
    let added: PortStatus = client.post("/v1/ports", &spec).expect("added");
    assert_eq!(added.spec, spec);
    let text = "vhost-user:red,socket=/run/red,mode=client";
    client
        .post::<PortStatus>("/v1/ports", &text)
        .expect("added as text");
    let ports: Vec<PortStatus> = client.get("/v1/ports").expect("listed");
    assert_eq!(
        ports
            .iter()
            .map(|port| port.spec.name.as_str())
            .collect::<Vec<_>>(),
        ["blue", "red"]
    );
    let to = QueueMove { pair: 1, worker: 3 };
    client
        .post::<PortStatus>("/v1/ports/blue/move", &to)
        .expect("moved");
    assert_eq!(running.memory.moves(), [("blue".to_owned(), to)]);
    client.delete::<()>("/v1/ports/blue").expect("deleted");
    let error = client
        .get::<PortStatus>("/v1/ports/blue")
        .expect_err("gone")
        .to_string();
    assert_eq!(
        error,
        "there is no port \"blue\": ringway port list shows those there are"
    );
}

#[test]
fn refuses_bad_ports_with_the_sentences_of_the_configuration() {
    let running = start(Memory::default());
    let client = client(&running);
    let post =
        |body: serde_json::Value| refusal(&client, Method::POST, "/v1/ports", &body.to_string());
    let (status, error) =
        post(json!({"name": "b", "type": "vhost-user", "socket": "/b", "queues": 99}));
    assert_eq!(
        (status, error.as_str()),
        (
            400,
            "port add: port \"b\": queues cannot be 99: write a number from 1 to 16 queue pairs"
        )
    );
    let (status, error) = post(json!({"name": "b", "type": "vhost-user", "sokcet": "/b"}));
    assert_eq!(
        (status, error.as_str()),
        (
            400,
            "port add: unknown key \"sokcet\": did you mean \"socket\"?"
        )
    );
    assert_eq!(post(json!(7)).0, 400);
    assert_eq!(post(json!("blue")).0, 400);
    let blue = json!("vhost-user:blue,socket=/blue");
    client
        .post::<PortStatus>("/v1/ports", &blue)
        .expect("added");
    assert_eq!(
        post(blue),
        (
            409,
            "port \"blue\" is there already: give each port its own name".to_owned()
        )
    );
    assert_eq!(
        running.memory_ports(),
        1,
        "nothing of what was refused is there"
    );
}

impl Running {
    fn memory_ports(&self) -> usize {
        client(self)
            .get::<Vec<PortStatus>>("/v1/ports")
            .expect("listed")
            .len()
    }
}

#[test]
fn keeps_static_stations_when_flushed_and_deletes_them_by_address() {
    let running = start(Memory::default());
    let client = client(&running);
    client
        .post::<PortStatus>("/v1/ports", &"vhost-user:blue,socket=/b")
        .expect("added");
    let station = json!({"mac": "02:00:00:00:00:01", "port": "blue", "vlan": 7});
    client.post::<()>("/v1/fdb", &station).expect("added");
    assert_eq!(
        client
            .post::<Removed>("/v1/fdb/flush", &json!({}))
            .expect("flushed")
            .removed,
        0
    );
    let page: FdbPage = client
        .get("/v1/fdb?port=blue&vlan=7&mac=02:00:00:00:00:01&limit=5")
        .expect("shown");
    assert_eq!((page.matching, page.entries[0].port.as_str()), (1, "blue"));
    assert_eq!(
        client
            .get::<FdbPage>("/v1/fdb?vlan=8")
            .expect("shown")
            .matching,
        0
    );
    assert_eq!(
        client
            .delete::<Removed>("/v1/fdb/02:00:00:00:00:01?vlan=8")
            .expect("asked")
            .removed,
        0
    );
    assert_eq!(
        client
            .delete::<Removed>("/v1/fdb/02:00:00:00:00:01")
            .expect("deleted")
            .removed,
        1
    );
    assert_eq!(refusal(&client, Method::DELETE, "/v1/fdb/xyz", "").0, 400);
    assert_eq!(
        refusal(&client, Method::GET, "/v1/fdb?colour=red", "").0,
        400
    );
    let nowhere = json!({"mac": "02:00:00:00:00:01", "port": "nowhere"}).to_string();
    assert_eq!(refusal(&client, Method::POST, "/v1/fdb", &nowhere).0, 404);
}

#[test]
fn reloads_only_the_difference_and_refuses_as_a_whole() {
    let running = start(Memory::default());
    let client = client(&running);
    let file = running.dir.path().join("ringway.toml");
    let port = |name: &str| {
        format!("[[port]]\nname = {name:?}\ntype = \"vhost-user\"\nsocket = \"/{name}\"\n")
    };
    std::fs::write(&file, port("blue") + &port("red")).expect("written");
    let reload = |body: &Reload| client.post::<Applied>("/v1/reload", body);
    let dry = Reload {
        dry_run: true,
        ..Reload::default()
    };
    assert_eq!(
        reload(&dry).expect("planned").actions,
        ["add port \"blue\" at /blue", "add port \"red\" at /red"]
    );
    assert_eq!(running.memory_ports(), 0, "a dry run changes nothing");
    assert_eq!(reload(&Reload::default()).expect("loaded").unchanged, 0);
    let text = port("blue") + &port("green") + "mode = \"client\"\n";
    let other = Reload {
        toml: Some(text.clone()),
        name: Some("other.toml".into()),
        dry_run: false,
    };
    let applied = reload(&other).expect("loaded");
    assert_eq!(
        applied.actions,
        ["delete port \"red\"", "add port \"green\" at /green"]
    );
    assert_eq!(applied.unchanged, 1);
    let broken = Reload {
        toml: Some(text + "queues = 0\n"),
        ..other
    };
    let error = reload(&broken).expect_err("refused").to_string();
    assert_eq!(
        error,
        "other.toml:10: port \"green\": queues cannot be 0: write a number from 1 to 16 queue pairs"
    );
    let restart = Reload {
        toml: Some("[fdb]\ncapacity = 100".into()),
        ..Reload::default()
    };
    assert!(
        reload(&restart)
            .expect_err("refused")
            .to_string()
            .starts_with("fdb.capacity cannot change")
    );
    let config: serde_json::Value = client.get("/v1/config").expect("shown");
    assert_eq!(config["port"].as_array().map(Vec::len), Some(2));
}

#[test]
fn serves_every_path_of_its_description() {
    let running = start(Memory::default());
    let client = client(&running);
    let described = serde_json::to_value(description()).expect("plain data");
    let served: serde_json::Value = client.get("/openapi.json").expect("served");
    assert_eq!(served, described);
    let paths = served["paths"].as_object().expect("paths");
    assert!(paths.len() >= 14, "{paths:?}");
    for (path, methods) in paths {
        for method in methods.as_object().expect("methods").keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            let (status, body) = client
                .ask(method.clone(), path, Bytes::new())
                .expect("an answer");
            let body = String::from_utf8_lossy(&body);
            assert!(
                !body.contains("no such path") && status != StatusCode::METHOD_NOT_ALLOWED,
                "{method} {path}: {status} {body}"
            );
        }
    }
    assert_eq!(refusal(&client, Method::GET, "/v2", "").0, 404);
    assert_eq!(refusal(&client, Method::PUT, "/v1/ports", "").0, 405);
}

#[test]
fn answers_health_metrics_version_and_stats() {
    let running = start(Memory::default());
    let client = client(&running);
    client
        .post::<PortStatus>("/v1/ports", &"vhost-user:blue,socket=/b")
        .expect("added");
    let text = |what: &str| {
        let (status, body) = client
            .ask(Method::GET, what, Bytes::new())
            .expect("an answer");
        assert_eq!(status, StatusCode::OK);
        String::from_utf8(body.to_vec()).expect("text")
    };
    assert_eq!(text("/healthz"), "ok\n");
    assert!(text("/metrics").contains("ringway_port_state{port=\"blue\",state=\"listening\"} 1"));
    assert_eq!(
        client.get::<Version>("/v1/version").expect("a version").pid,
        std::process::id()
    );
    let stats: StatsReport = client.get("/v1/stats").expect("counters");
    assert!(stats.total.balanced() && stats.ports_total() == stats.total);
}

#[test]
fn belongs_to_its_owner_alone_and_cleans_up() {
    let running = start(Memory::default());
    let path = running.api.path().to_owned();
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Api::listen(ApiSettings::private(&path))
        .expect_err("taken")
        .to_string();
    assert!(second.contains("address already in use"), "{second}");
    drop(running.api);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound, then left by the dead"));
    let again =
        Api::listen(ApiSettings::private(&path)).and_then(|waiting| waiting.serve(running.memory));
    assert_eq!(client_health(&again.expect("replaces it")), "ok\n");
}

fn client_health(api: &Api) -> String {
    let (_, body) = Client::new(api.path())
        .ask(Method::GET, "/healthz", Bytes::new())
        .expect("an answer");
    String::from_utf8_lossy(&body).into_owned()
}

#[test]
fn stops_within_100_ms_whatever_its_clients_do() {
    let running = start(Memory::slow(Duration::from_secs(3)));
    let path = running.api.path().to_owned();
    let _idle = UnixStream::connect(&path).expect("connected");
    let mut half = UnixStream::connect(&path).expect("connected");
    half.write_all(b"GET /v1/ports HTTP/1.1\r\nhost:")
        .expect("sent");
    let mut waiting = UnixStream::connect(&path).expect("connected");
    waiting
        .write_all(b"GET /v1/workers HTTP/1.1\r\nhost: r\r\n\r\n")
        .expect("sent");
    std::thread::sleep(Duration::from_millis(50));
    let before = Instant::now();
    drop(running.api);
    let took = before.elapsed();
    // 100 ms to stop, and as much again for a machine that runs other tests meanwhile.
    assert!(took < Duration::from_millis(200), "{took:?}");
    assert!(!path.exists());
}

#[test]
fn a_blocked_question_does_not_block_the_others() {
    let running = start(Memory::slow(Duration::from_millis(800)));
    let slow = client(&running);
    let asking = std::thread::spawn(move || slow.get::<serde_json::Value>("/v1/workers"));
    std::thread::sleep(Duration::from_millis(100));
    let before = Instant::now();
    assert_eq!(running.memory_ports(), 0);
    assert!(before.elapsed() < Duration::from_millis(500));
    asking
        .join()
        .expect("no panic")
        .expect("answered in the end");
}

#[test]
fn garbage_and_slow_clients_hurt_only_themselves() {
    let running = start(Memory::default());
    let path = running.api.path().to_owned();
    let mut garbage = UnixStream::connect(&path).expect("connected");
    garbage.write_all(&[0xff; 4096]).expect("sent");
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"));
    let client = client(&running);
    let large = format!("\"{}\"", "x".repeat(3 << 20));
    // Refused by its length alone: whoever still writes may find the connection closed before he has read why.
    let refused = client.ask(Method::POST, "/v1/ports", Bytes::from(large));
    if let Ok((status, _)) = refused {
        assert_eq!(status.as_u16(), 413);
    }
    let deep = "[".repeat(100_000);
    assert_eq!(refusal(&client, Method::POST, "/v1/ports", &deep).0, 400);
    // As many as may connect at one time, and then some, all silent: their time runs out, the next one is served.
    let silent: Vec<UnixStream> = (0..40)
        .map(|_| UnixStream::connect(&path).expect("connected"))
        .collect();
    let before = Instant::now();
    assert_eq!(client_health(&running.api), "ok\n");
    assert!(
        before.elapsed() < Duration::from_secs(8),
        "{:?}",
        before.elapsed()
    );
    drop(silent);
}

#[test]
fn the_configuration_it_shows_can_be_loaded_again() {
    let config = Config::default();
    let text = config.to_toml();
    let host = ringway::control::cpu::HostCpus::of_size(2);
    assert_eq!(Config::parse(&text, "shown", &host), Ok(config));
}
