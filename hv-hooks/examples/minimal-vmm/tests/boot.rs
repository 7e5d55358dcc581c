//! Small guests on this host's KVM: a few instructions each, in an ELF file with a PVH note. Where there is no
//! `/dev/kvm` every test shows as ignored.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use hv_hooks::kvm::HostKind;
use libtest_mimic::{Arguments, Failed, Trial};
use minimal_vmm::{Config, Error, Exit, SerialEnd, Vmm};

const LIMIT: Duration = Duration::from_secs(10);
const LOAD_AT: u32 = 0x10_0000;

/// Writes "hi", waits for a byte on the serial port, echoes it and ends with it as code.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, // mov al, 'i'; out dx, al
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xfb, // in al, dx; test al, 1; jz back to in
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, 0xee, 0xe6, 0xf4, // in al, dx; out dx, al; out 0xf4, al
    0xeb, 0xfe, // jmp to itself
];
/// Loads an empty IDT and faults: a triple fault.
const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x01, 0x1d, 0x00, 0x00, 0x00, 0x00, // lidt [0], six zeros
    0x0f, 0x0b, // ud2
];
/// Writes `SLP_EN` and the type of `_S5` to the sleep control register.
const POWER_OFF: &[u8] = &[
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, 0xee, // mov al, 0x34; out dx, al
    0xeb, 0xfe, // jmp to itself
];
const SPIN: &[u8] = &[0xeb, 0xfe];

/// An ELF file that loads `code` at 1 MiB; the note names the entry point, or is of another type.
fn elf(code: &[u8], note_type: u32) -> Vec<u8> {
    const NOTE_AT: u64 = 64 + 2 * 56;
    const CODE_AT: u64 = NOTE_AT + 20;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |size: usize, value: u64| file.extend(&value.to_le_bytes()[..size]);
    // e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum, ...
    [(2, 2), (2, 62), (4, 1), (8, u64::from(LOAD_AT)), (8, 64), (8, 0), (4, 0)]
        .into_iter()
        .chain([(2, 64), (2, 56), (2, 2), (2, 0), (2, 0), (2, 0)])
        .for_each(|(size, value)| put(size, value));
    let size = code.len() as u64;
    for (kind, at, address, size) in
        [(1, CODE_AT, u64::from(LOAD_AT), size), (4, NOTE_AT, 0, CODE_AT - NOTE_AT)]
    {
        // p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        [(4, kind), (4, 7), (8, at), (8, address), (8, address), (8, size), (8, size), (8, 4)]
            .into_iter()
            .for_each(|(size, value)| put(size, value));
    }
    [4, 4, note_type].into_iter().for_each(|word| put(4, u64::from(word)));
    file.extend(b"Xen\0");
    file.extend(LOAD_AT.to_le_bytes());
    file.extend(code);
    file
}

fn config(kernel: &Path, vcpus: u8) -> Config {
    Config {
        kernel: kernel.to_owned(),
        initrd: None,
        cmdline: String::new(),
        memory_mib: 16,
        vcpus,
        disk: None,
        serial: SerialEnd::Memory,
    }
}

/// Runs `test` with a folder that holds `kernel` with this code.
fn with_kernel<T>(code: &[u8], test: impl FnOnce(&Path) -> Result<T, Failed>) -> Result<T, Failed> {
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, elf(code, 18))?;
    test(&kernel)
}

/// Starts a VM, types `input`, waits for its end; returns it with the console's output.
fn run(mut vmm: Vmm, input: &[u8]) -> Result<(Exit, Vec<u8>), Failed> {
    vmm.start()?;
    vmm.serial_input(input);
    let exit = vmm.wait(Some(LIMIT))?.ok_or("the guest did not end in time")?;
    let output = vmm.serial_output();
    assert_eq!(vmm.stop()?, exit);
    Ok((exit, output))
}

fn echo() -> Result<(), Failed> {
    let (exit, output) = with_kernel(ECHO, |kernel| run(Vmm::new(&config(kernel, 1))?, b"A"))?;
    assert_eq!((exit, output), (Exit::Code(b'A'), b"hiA".to_vec()));
    Ok(())
}

fn echo_with_ports() -> Result<(), Failed> {
    with_kernel(ECHO, |kernel| {
        let mut vmm = Vmm::new(&config(kernel, 2))?;
        let machine = vmm.guard()?;
        let (exit, _) = run(vmm, b"A")?;
        assert_eq!(exit, Exit::Code(b'A'));
        Ok(machine.detach()?)
    })
}

fn triple_fault() -> Result<(), Failed> {
    let (exit, _) = with_kernel(TRIPLE_FAULT, |kernel| run(Vmm::new(&config(kernel, 1))?, b""))?;
    assert_eq!(exit, Exit::TripleFault);
    Ok(())
}

fn power_off() -> Result<(), Failed> {
    let (exit, _) = with_kernel(POWER_OFF, |kernel| run(Vmm::new(&config(kernel, 1))?, b""))?;
    assert_eq!(exit, Exit::PowerOff);
    Ok(())
}

fn stop_while_running() -> Result<(), Failed> {
    with_kernel(SPIN, |kernel| {
        let mut vmm = Vmm::new(&config(kernel, 4))?;
        vmm.start()?;
        assert_eq!(vmm.wait(Some(Duration::from_millis(50)))?, None);
        assert!(matches!(vmm.guard(), Err(Error::Started)), "a guard after the start");
        let start = Instant::now();
        assert_eq!(vmm.stop()?, Exit::Stopped);
        assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
        Ok(())
    })
}

fn console_on_a_socket() -> Result<(), Failed> {
    use std::io::{Read, Write};
    with_kernel(ECHO, |kernel| {
        let socket = kernel.with_file_name("serial");
        let serial = SerialEnd::Unix(socket.clone());
        let mut vmm = Vmm::new(&Config { serial, ..config(kernel, 1) })?;
        let mut peer = std::os::unix::net::UnixStream::connect(&socket)?;
        peer.write_all(b"B")?;
        assert_eq!(vmm.wait(Some(Duration::from_millis(50)))?, None);
        assert_eq!(run(vmm, b"")?.0, Exit::Code(b'B'));
        let mut output = Vec::new();
        peer.read_to_end(&mut output)?;
        assert_eq!(output, b"hiB");
        assert!(!socket.exists(), "the socket is left behind");
        Ok(())
    })
}

fn refusals() -> Result<(), Failed> {
    with_kernel(SPIN, |kernel| {
        let refused = |config: Config| match Vmm::new(&config) {
            Ok(_) => Err(Failed::from("a VM was built")),
            Err(error) => Ok(error.to_string()),
        };
        let name = kernel.display().to_string();
        assert!(refused(config(kernel, 0))?.starts_with("0 vCPUs"));
        let big = kernel.with_file_name("big");
        fs::File::create(&big)?.set_len(1 << 25)?;
        let text = refused(Config { initrd: Some(big), ..config(kernel, 1) })?;
        assert!(text.starts_with("initrd does not fit: 33554432 bytes"), "{text}");
        let text = refused(Config { cmdline: "x".repeat(2048), ..config(kernel, 1) })?;
        assert!(text.starts_with("command line does not fit"), "{text}");
        let text = refused(Config { disk: Some("/nowhere".into()), ..config(kernel, 1) })?;
        assert!(text.starts_with("/nowhere: "), "{text}");
        fs::write(kernel, elf(SPIN, 17))?;
        let text = refused(config(kernel, 1))?;
        assert!(text.starts_with(&name) && text.contains("no PVH entry point"), "{text}");
        fs::write(kernel, b"#!/bin/sh")?;
        let text = refused(config(kernel, 1))?;
        assert!(text.starts_with(&name), "{text}");
        Ok(())
    })
}

fn main() {
    let host = HostKind::detect();
    println!("{host}");
    type Test = fn() -> Result<(), Failed>;
    let tests: [(&str, Test); 7] = [
        ("echo", echo),
        ("echo_with_ports", echo_with_ports),
        ("triple_fault", triple_fault),
        ("power_off", power_off),
        ("stop_while_running", stop_while_running),
        ("console_on_a_socket", console_on_a_socket),
        ("refusals", refusals),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, test).with_ignored_flag(matches!(host, HostKind::None { .. }))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit();
}
