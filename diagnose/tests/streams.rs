//! Migration streams that QEMU itself writes, of machines whose RAM is interrupted by the PCI hole, lies in several
//! blocks, or is plugged in. No guest runs: QEMU's loader puts a text at guest-physical addresses.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use defib_diagnose::dump::{self, Dump, FormatKind, Hints, Remark, SplitBy};
use guest::{GuestPhys, Machine, MemoryError, Reg, Vcpu};

const TEXT: &[u8; 16] = b"here is some RAM";
const GIB: u64 = 1 << 30;

/// A stream of a machine with these arguments and the text at these addresses, before its first instruction.
fn stream(name: &str, arguments: &str, at: &[u64]) -> Dump {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("streams");
    fs::create_dir_all(&folder).unwrap();
    let (text, file) = (folder.join(format!("{name}.text")), folder.join(name));
    fs::write(&text, TEXT).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-accel tcg -nodefaults -display none -S -smp 2 -qmp stdio".split(' '));
    qemu.args(arguments.split(' '));
    for at in at {
        let loader = format!("loader,file={},addr={at:#x},force-raw=on", text.display());
        qemu.args(["-device", &loader]);
    }
    let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut answers = BufReader::new(qemu.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut input = qemu.stdin.take().unwrap();
    let mut command = |command: &str| {
        writeln!(input, "{{ {command} }}").unwrap();
        answers.find(|line| line.contains("\"return\"") || line.contains("\"error\"")).unwrap()
    };
    command(r#""execute": "qmp_capabilities""#);
    let fast = 1u64 << 40;
    let fast = format!(
        r#""execute": "migrate-set-parameters", "arguments": {{ "max-bandwidth": {fast} }}"#
    );
    command(&fast);
    let uri = format!("exec:cat >'{}'", file.display());
    command(&format!(r#""execute": "migrate", "arguments": {{ "uri": "{uri}" }}"#));
    let done = (0..1200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        command(r#""execute": "query-migrate""#).contains("completed")
    });
    command(r#""execute": "quit""#);
    qemu.wait().unwrap();
    assert!(done, "the migration does not end");
    let dump = dump::open(&[&file], &Hints::default()).unwrap();
    // The mapping keeps it.
    fs::remove_file(&file).unwrap();
    fs::remove_file(&text).unwrap();
    dump
}

#[track_caller]
fn must_have_text(dump: &Dump, at: &[u64]) {
    for at in at {
        let mut text = [0; TEXT.len()];
        dump.phys().read(GuestPhys(*at), &mut text).unwrap();
        assert_eq!(&text, TEXT, "{at:#x}");
    }
}

#[test]
fn the_hole_of_each_board_is_where_the_guest_has_it() {
    for (board, below_4g) in [("pc", 3 * GIB), ("q35", 2 * GIB), ("pc,max-ram-below-4g=1G", GIB)] {
        let at = [0x10_0000, below_4g - 16, 4 * GIB, 8 * GIB - below_4g - 16];
        let mut dump = stream("hole", &format!("-machine {board} -m 4G"), &at);
        assert_eq!(dump.format().kind, FormatKind::Migration { libvirt: false });
        must_have_text(&dump, &at);
        let hole = GuestPhys(below_4g);
        assert_eq!(dump.phys().read_u64(hole), Err(MemoryError::NotRam { at: hole, len: 8 }));
        assert_eq!((dump.coverage().ram, dump.coverage().captured), (4 * GIB, 4 * GIB));
        let split = Remark::Split { below_4g, above_4g: 4 * GIB - below_4g, by: SplitBy::Cmos };
        assert_eq!(dump.remarks(), [split, Remark::NoVmcoreinfo]);
        assert_eq!(dump.vcpu_count(), 2);
        // The reset vector (Intel SDM 3A 10.1.4).
        let registers = dump.registers(Vcpu(1)).unwrap();
        let get = [Reg::Rip, Reg::Cs, Reg::Cr0, Reg::Efer].map(|reg| registers.get(reg));
        assert_eq!(get, [Some(0xfff0), Some(0xf000), Some(0x6000_0010), Some(0)]);
    }
}

#[test]
fn nodes_are_one_and_what_was_plugged_in_is_left_out() {
    let memory = |id: &str, size: &str| format!("-object memory-backend-ram,id={id},size={size}");
    let arguments = [
        "-machine q35 -m 3G,slots=2,maxmem=8G",
        &memory("ram-node0", "1G"),
        &memory("ram-node1", "2G"),
        "-numa node,memdev=ram-node0,cpus=0 -numa node,memdev=ram-node1,cpus=1",
        &memory("dimm", "512M"),
        "-device pc-dimm,memdev=dimm",
    ];
    // The end of the first node, the start of the second one, the end of RAM.
    let at = [GIB - 16, GIB, 2 * GIB - 16, 4 * GIB, 5 * GIB - 16];
    let dump = stream("nodes", &arguments.join(" "), &at);
    must_have_text(&dump, &at);
    assert_eq!(dump.coverage().captured, 3 * GIB);
    let left_out = |remark: &Remark| matches!(remark, Remark::BlockLeftOut { name, .. } if name.ends_with("dimm"));
    assert!(dump.remarks().iter().any(left_out), "{:?}", dump.remarks());
}
