//! What real peers need and no package installs: a guest's kernel, a container's image. Made once, kept in
//! `target/testkit-assets`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{run, target_dir};

/// A download or a debootstrap over a slow line.
const FETCH: Duration = Duration::from_secs(600);
const UNPACK: Duration = Duration::from_secs(120);

/// The folder of the assets.
pub fn dir() -> Result<PathBuf> {
    let dir = target_dir().join("testkit-assets");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

/// The asset of this name; `make` builds it at the path it is given when it is not there yet.
///
/// It appears under its name only when it is whole, so an interrupted run leaves nothing that looks ready.
pub fn cached(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = dir()?.join(name);
    if !path.exists() {
        let part = dir()?.join(format!("{name}.part"));
        let _ = std::fs::remove_dir_all(&part);
        let _ = std::fs::remove_file(&part);
        make(&part).with_context(|| format!("making {}", path.display()))?;
        std::fs::rename(&part, &path)?;
    }
    Ok(path)
}

/// Unpacks Debian's `package` into `root` without installing it.
pub fn unpack_package(package: &str, root: &Path) -> Result<()> {
    let fetched = tempfile::tempdir_in(dir()?)?;
    let shell = format!(
        "cd '{}' && apt-get -q download {package}",
        fetched.path().display()
    );
    run(["sh", "-c", &shell], FETCH)
        .with_context(|| format!("cannot download {package}: apt-get update may help"))?;
    let file = std::fs::read_dir(fetched.path())?
        .flatten()
        .map(|f| f.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"));
    let file = file.with_context(|| format!("apt-get download {package} left no file"))?;
    std::fs::create_dir_all(root)?;
    run(
        [
            "dpkg".as_ref(),
            "-x".as_ref(),
            file.as_os_str(),
            root.as_os_str(),
        ],
        UNPACK,
    )
    .map(drop)
}

/// Debian's current 6.1 kernel for PCs, unpacked.
pub struct Kernel {
    /// The uncompressed ELF image, booted by its PVH entry: decompressing inside an emulated machine takes long.
    pub vmlinux: PathBuf,
    /// `/lib/modules/VERSION/kernel`.
    pub modules: PathBuf,
}

/// The guest's kernel, fetched on first use.
pub fn kernel() -> Result<Kernel> {
    let root = kernel_tree()?;
    let modules = one(&root.join("lib/modules"), "")?.join("kernel");
    Ok(Kernel {
        vmlinux: root.join("vmlinux"),
        modules,
    })
}

/// The unpacked package of [`kernel`], with `vmlinux` beside its folders.
pub fn kernel_tree() -> Result<PathBuf> {
    cached("kernel", |root| {
        let depends = run(["apt-cache", "depends", "linux-image-amd64"], UNPACK)?;
        let package = depends
            .split_whitespace()
            .find(|word| word.starts_with("linux-image-") && *word != "linux-image-amd64");
        unpack_package(
            package.context("linux-image-amd64 depends on no kernel")?,
            root,
        )?;
        unpack_kernel(&one(&root.join("boot"), "vmlinuz-")?, &root.join("vmlinux"))
    })
}

/// Makes the ELF image `plain` of the bzImage `image`.
pub fn unpack_kernel(image: &Path, plain: &Path) -> Result<()> {
    let bytes = std::fs::read(image)?;
    let payload = payload(&bytes)?;
    let unpack = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd -dcq",
        _ => "xz -dc --single-stream",
    };
    let packed = plain.with_extension("packed");
    std::fs::write(&packed, payload)?;
    let shell = format!("{unpack} '{}' > '{}'", packed.display(), plain.display());
    run(["sh", "-c", &shell], UNPACK)?;
    std::fs::remove_file(packed).map_err(Into::into)
}

/// The compressed kernel inside a bzImage (Linux `Documentation/arch/x86/boot.rst`, protocol 2.08 and later).
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage");
    let setup_sectors = usize::from(image[0x1f1]) + 1;
    let start = setup_sectors * 512 + word(0x248).context("too short")?;
    // The last 4 bytes are the unpacked size, not part of the stream.
    let length = word(0x24c).context("too short")?.saturating_sub(4);
    image
        .get(start..start + length)
        .context("the payload lies outside the image")
}

fn one(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(dir)
        .with_context(|| dir.display().to_string())?
        .flatten();
    let file = files.find(|file| file.file_name().to_string_lossy().starts_with(prefix));
    file.map(|file| file.path())
        .with_context(|| format!("no {prefix}* in {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_payload_behind_the_setup_sectors() {
        let mut image = vec![0; 4 * 512];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&8u32.to_le_bytes());
        image[1024 + 16..1024 + 20].copy_from_slice(b"data");
        assert_eq!(payload(&image).unwrap(), b"data");
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&image).is_err());
        assert!(payload(b"short").is_err());
    }

    #[test]
    fn an_asset_that_failed_is_made_again() {
        let name = format!("test-{}", std::process::id());
        assert!(
            cached(&name, |part| Ok(std::fs::write(part, "half")?)
                .and_then(|()| anyhow::bail!("broken")))
            .is_err()
        );
        let path = cached(&name, |part| Ok(std::fs::write(part, "whole")?)).unwrap();
        let again = cached(&name, |_| anyhow::bail!("made twice")).unwrap();
        assert_eq!(
            (std::fs::read_to_string(&path).unwrap(), &again),
            ("whole".to_owned(), &path)
        );
        std::fs::remove_file(path).unwrap();
    }
}
