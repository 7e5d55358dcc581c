//! Which running QEMU is meant: by socket, by process id or by the name of the VM.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::cli::Target;

/// The QMP socket of the VM that the arguments name.
///
/// # Errors
/// When no such VM runs here, several do, or it has no QMP socket.
pub fn qmp_socket(target: &Target) -> Result<PathBuf> {
    if let Some(socket) = &target.qmp {
        return Ok(socket.clone());
    }
    if let Some(pid) = target.pid {
        let arguments = command_line(pid).with_context(|| format!("no process {pid}"))?;
        return socket_of(&arguments)
            .with_context(|| format!("process {pid} has no QMP socket on its command line"));
    }
    let name = target.domain.as_deref().context("name a VM: --qmp, --domain or --pid")?;
    let found: Vec<(u32, PathBuf)> = processes()
        .filter_map(|pid| {
            let arguments = command_line(pid)?;
            is_named(&arguments, name).then(|| socket_of(&arguments).map(|socket| (pid, socket)))?
        })
        .collect();
    match found.as_slice() {
        [(_, socket)] => Ok(socket.clone()),
        [] => bail!("no running QEMU with a QMP socket is named {name:?}"),
        several => bail!(
            "several running QEMUs are named {name:?}: pids {:?}; use --pid",
            several.iter().map(|(pid, _)| pid).collect::<Vec<_>>()
        ),
    }
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn command_line(pid: u32) -> Option<Vec<String>> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(
        raw.split(|&byte| byte == 0)
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect(),
    )
}

/// Value of `key=` in a QEMU option list such as `guest=web,debug-threads=on`.
fn option<'a>(list: &'a str, key: &str) -> Option<&'a str> {
    list.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
}

fn is_named(arguments: &[String], name: &str) -> bool {
    arguments.windows(2).any(|pair| {
        pair[0] == "-name"
            && (option(&pair[1], "guest") == Some(name) || pair[1].split(',').next() == Some(name))
    })
}

/// The unix socket of a QMP monitor: `-qmp unix:PATH,…`, or `-chardev socket,id=X,path=PATH` with
/// `-mon chardev=X,mode=control` (the form libvirt uses).
fn socket_of(arguments: &[String]) -> Option<PathBuf> {
    let of = |flag: &str| {
        arguments
            .windows(2)
            .filter(move |pair| pair[0] == flag)
            .map(|pair| pair[1].clone())
            .collect::<Vec<_>>()
    };
    for value in of("-qmp") {
        if let Some(rest) = value.strip_prefix("unix:") {
            return rest.split(',').next().map(PathBuf::from);
        }
    }
    for monitor in of("-mon") {
        if option(&monitor, "mode") != Some("control") {
            continue;
        }
        let id = option(&monitor, "chardev")?;
        let socket =
            of("-chardev").into_iter().find(|chardev| option(chardev, "id") == Some(id))?;
        return option(&socket, "path").map(PathBuf::from);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn finds_plain_and_libvirt_sockets() {
        let plain = words("qemu -name web -qmp unix:/run/q.sock,server=on,wait=off");
        assert_eq!(socket_of(&plain), Some("/run/q.sock".into()));
        assert!(is_named(&plain, "web"));
        let libvirt = words(
            "qemu -name guest=db,debug-threads=on -chardev socket,id=charmonitor,path=/var/m.sock \
             -mon chardev=charmonitor,id=monitor,mode=control",
        );
        assert_eq!(socket_of(&libvirt), Some("/var/m.sock".into()));
        assert!(is_named(&libvirt, "db"));
        assert!(!is_named(&libvirt, "d"));
        assert_eq!(socket_of(&words("qemu -monitor stdio")), None);
    }
}
