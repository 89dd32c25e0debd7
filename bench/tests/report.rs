//! `ringway-bench report` on a run that was really measured: tables, a page, a comparison, and what it refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use roxmltree::{Document, Node, ParsingOptions};
use serde_json::Value;
use tempfile::{TempDir, tempdir};
use testkit::require;
use testkit::skip::tool;

/// Short runs of Ringway, OVS-DPDK and testpmd on a virtual machine.
const REAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/saved-run.json");

/// Every plot that such runs have.
const PLOTS: [&str; 16] = [
    "sizes-search-0",
    "sizes-closed-0",
    "rates-far",
    "cycles-far",
    "latency-0",
    "latency-1",
    "latency-2",
    "latency-3",
    "loss-0",
    "chain-latency",
    "chain-jitter",
    "chain-rate",
    "idle",
    "idle-cycles",
    "idle-compare",
    "attach",
];

fn report(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringway-bench"));
    command
        .arg("report")
        .args(arguments)
        .output()
        .context("ringway-bench report")
}

/// Its tables, where it must succeed.
fn tables(arguments: &[&str]) -> Result<String> {
    let output = report(arguments)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {errors}");
    Ok(String::from_utf8(output.stdout)?)
}

/// What it says where it must fail: one line.
fn refusal(arguments: &[&str]) -> Result<String> {
    let output = report(arguments)?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success(), "{arguments:?}: it went well");
    ensure!(errors.trim_end().lines().count() == 1, "{errors}");
    Ok(errors)
}

/// The real run with something changed, as a file.
fn changed(directory: &TempDir, name: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    let mut run: Value = serde_json::from_str(&std::fs::read_to_string(REAL)?)?;
    change(&mut run);
    let path = directory.path().join(name);
    std::fs::write(&path, run.to_string())?;
    Ok(path.display().to_string())
}

fn page(directory: &TempDir) -> Result<PathBuf> {
    let path = directory.path().join("page.html");
    tables(&[REAL, "--html", &path.display().to_string()])?;
    Ok(path)
}

fn count(node: Node, tag: &str) -> usize {
    node.descendants().filter(|it| it.has_tag_name(tag)).count()
}

#[test]
fn a_page_of_a_real_run_is_well_formed_and_has_every_plot_with_a_legend() -> Result<()> {
    let directory = tempdir()?;
    let text = std::fs::read_to_string(page(&directory)?)?;
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(&text, options)?;
    let figures: Vec<_> = document
        .descendants()
        .filter(|node| node.has_tag_name("figure"))
        .collect();
    let ids: Vec<_> = figures.iter().filter_map(|it| it.attribute("id")).collect();
    for plot in PLOTS {
        ensure!(ids.contains(&plot), "{plot} is not among {ids:?}");
    }
    for figure in &figures {
        let id = figure.attribute("id").unwrap_or_default();
        let drawings = figure.children().filter(|it| it.has_tag_name("svg"));
        ensure!(drawings.clone().count() == 2, "{id}: wide and narrow");
        for drawing in drawings {
            let drawn =
                count(drawing, "polyline") + count(drawing, "rect") + count(drawing, "circle");
            ensure!(
                drawn >= 2 && count(drawing, "text") >= 4,
                "{id}: {drawn} shapes"
            );
        }
        ensure!(count(*figure, "li") >= 1, "{id}: no legend");
    }
    // A link that leads nowhere is worse than none.
    for link in document.descendants().filter(|it| it.has_tag_name("a")) {
        let place = link.attribute("href").and_then(|to| to.strip_prefix('#'));
        let place = place.context("a link out of the page")?;
        ensure!(
            document
                .descendants()
                .any(|it| it.attribute("id") == Some(place)),
            "#{place}"
        );
    }
    ensure!(count(document.root(), "table") >= 12, "tables");
    Ok(())
}

#[test]
fn a_page_needs_nothing_from_elsewhere_and_names_its_circumstances() -> Result<()> {
    let directory = tempdir()?;
    let text = std::fs::read_to_string(page(&directory)?)?;
    for foreign in [
        "http:", "https:", "src=", "url(", "@import", "<script", "<link", "<iframe", "<img",
    ] {
        ensure!(!text.contains(foreign), "{foreign}");
    }
    for known in [
        "default-src 'none'",
        "bench-vm: AMD EPYC",
        "virtual machine",
        "Open vSwitch 3.1.0 with DPDK 22.11.11",
        "ringway-bench rfc2544 --switch ringway,ovs,testpmd",
        "left out: testpmd in idle64",
        "38 samples, 7 of them discarded",
    ] {
        ensure!(text.contains(known), "{known}");
    }
    Ok(())
}

#[test]
fn what_a_saved_run_says_cannot_become_a_part_of_the_page() -> Result<()> {
    let directory = tempdir()?;
    let hostile = changed(&directory, "hostile.json", |run| {
        run["caveats"][0] = "</li><script>alert(1)</script>\u{1}".into();
        run["measurements"][0]["peer"] = "<b>\"bold\"".into();
        run["host"]["name"] = "<img src=x>".into();
    })?;
    let path = directory.path().join("page.html").display().to_string();
    tables(&[&hostile, "--html", &path])?;
    let text = std::fs::read_to_string(path)?;
    ensure!(!text.contains("<script") && !text.contains("<img") && !text.contains("<b>"));
    Ok(())
}

#[test]
fn tables_are_drawn_again_on_the_terminal_and_as_markdown() -> Result<()> {
    let directory = tempdir()?;
    let path = directory.path().join("run.md");
    let text = tables(&[REAL, "--markdown", &path.display().to_string()])?;
    for known in [
        "far: Mpps received by the client",
        "chains of containers",
        "two busy ports among silent",
        "nothing came through",
    ] {
        ensure!(text.contains(known), "{known}: {text}");
    }
    ensure!(std::fs::read_to_string(&path)?.contains("| work | ringway |"));
    Ok(())
}

#[test]
fn a_run_compared_with_itself_has_no_difference_and_a_doubled_one_has() -> Result<()> {
    let same = tables(&[REAL, "--baseline", REAL])?;
    ensure!(
        same.contains("+0.0 %") && !same.contains("WARNING"),
        "{same}"
    );
    ensure!(
        !same.contains("WORSE") && !same.contains("better"),
        "{same}"
    );
    let directory = tempdir()?;
    let halved = changed(&directory, "old.json", |run| {
        for one in run["measurements"].as_array_mut().into_iter().flatten() {
            for sample in one["samples"].as_array_mut().into_iter().flatten() {
                sample["mpps"] = (sample["mpps"].as_f64().unwrap_or(0.0) / 2.0).into();
            }
        }
        run["host"]["name"] = "another-vm".into();
    })?;
    let path = directory.path().join("page.html").display().to_string();
    let text = tables(&[REAL, "--baseline", &halved, "--html", &path])?;
    ensure!(
        text.contains("+100.0 %") && text.contains("better, spreads apart"),
        "{text}"
    );
    ensure!(
        text.contains("WARNING") && text.contains("another-vm"),
        "{text}"
    );
    let page = std::fs::read_to_string(path)?;
    ensure!(
        page.contains("spreads apart")
            && page.contains("another-vm")
            && page.contains("id=\"compared\"")
    );
    Ok(())
}

#[test]
fn what_cannot_be_read_or_compared_is_a_sentence_with_its_remedy() -> Result<()> {
    let directory = tempdir()?;
    let said = refusal(&["/nonexistent/run.json"])?;
    ensure!(
        said.contains("/nonexistent/run.json") && said.contains("--json FILE"),
        "{said}"
    );
    let said = refusal(&[concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])?;
    ensure!(
        said.contains("not a saved run") && said.contains("--json FILE"),
        "{said}"
    );
    let newer = changed(&directory, "newer.json", |run| run["format"] = 99.into())?;
    let said = refusal(&[&newer])?;
    ensure!(
        said.contains("newer ringway-bench") && said.contains("99"),
        "{said}"
    );
    let damaged = changed(&directory, "damaged.json", |run| {
        run["cpus"] = "none".into()
    })?;
    let said = refusal(&[&damaged])?;
    ensure!(
        said.contains("damaged") && said.contains("measure again"),
        "{said}"
    );
    let other = changed(&directory, "other.json", |run| {
        run["host"]["name"] = "another-vm".into()
    })?;
    let said = refusal(&[REAL, &other])?;
    ensure!(
        said.contains("another-vm") && said.contains("--baseline"),
        "{said}"
    );
    let nothing = changed(&directory, "nothing.json", |run| {
        run["measurements"] = Value::Array(vec![])
    })?;
    let said = refusal(&[REAL, "--baseline", &nothing])?;
    ensure!(
        said.contains("no figure in common") && said.contains("same command"),
        "{said}"
    );
    let said = refusal(&[REAL, "--html", "/nonexistent/page.html"])?;
    ensure!(said.contains("/nonexistent/page.html"), "{said}");
    Ok(())
}

/// What a browser shows of the page, as pixels of red, green, blue (and more).
fn screenshot(page: &Path, width: u32, directory: &TempDir) -> Result<(Vec<u8>, usize)> {
    let picture = directory.path().join(format!("{width}.png"));
    let output = Command::new("timeout")
        .args([
            "-k",
            "5",
            "120",
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
        ])
        .args(["--hide-scrollbars", "--force-color-profile=srgb"])
        .arg(format!(
            "--user-data-dir={}",
            directory.path().join("profile").display()
        ))
        .arg(format!("--window-size={width},4000"))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .context("chromium")?;
    let file = std::fs::File::open(&picture)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info()?;
    let size = reader.output_buffer_size().context("too large a picture")?;
    let mut pixels = vec![0; size];
    let info = reader.next_frame(&mut pixels)?;
    ensure!(info.width == width, "{} wide", info.width);
    Ok((pixels, info.color_type.samples()))
}

#[test]
fn a_browser_shows_the_page_with_the_colours_of_all_switches() -> Result<()> {
    require!(tool("chromium", "chromium"));
    let directory = tempdir()?;
    let page = page(&directory)?;
    for width in [1200, 500] {
        let (pixels, samples) = screenshot(&page, width, &directory)?;
        let all = pixels.len() / samples;
        let white = pixels
            .chunks_exact(samples)
            .filter(|it| it[..3] == [255, 255, 255])
            .count();
        ensure!(
            white > all / 10 && white < all * 97 / 100,
            "{width}: {white} of {all} are white"
        );
        for (switch, colour) in [
            ("ringway", [0x0B, 0x62, 0xC4]),
            ("ovs", [0xD4, 0x5D, 0x00]),
            ("testpmd", [0x00, 0x8F, 0x68]),
        ] {
            let seen = pixels
                .chunks_exact(samples)
                .filter(|it| it[..3] == colour)
                .count();
            ensure!(seen > 100, "{width}: {seen} pixels of {switch}");
        }
    }
    Ok(())
}
