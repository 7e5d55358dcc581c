//! The QEMU backend against a real QEMU that sits in its firmware: attaching, detaching, memory, fresh memory,
//! stops, resets, and what happens after a guard was killed. No guest kernel is needed.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use defib_hv_hooks::Error;
use defib_hv_hooks::qemu::{AttachOptions, Qemu};
use guest::{
    Call, CallOutcome, Control, FreshKind, FreshMemory, GuestPhys, GuestVirt, Hook, HookKind,
    Hooks, Machine, MachineError, Reg, StopReason, Vcpu, WriteMemory,
};
use serde_json::{Value, json};

const SHARED: &[&str] = &[
    "-m",
    "64,slots=2,maxmem=256M",
    "-object",
    "memory-backend-memfd,id=ram,size=64M,share=on",
    "-machine",
    "pc,memory-backend=ram",
];
const PRIVATE: &[&str] = &["-m", "64"];
const LIMIT: Duration = Duration::from_secs(20);

/// A QEMU of our own, ended when dropped.
struct Vm {
    child: Child,
    dir: tempfile::TempDir,
}

impl Vm {
    fn boot(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qmp = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-accel", "tcg", "-smp", "2", "-display", "none", "-monitor", "none", "-serial",
                "none",
            ])
            .args(["-net", "none", "-qmp", &qmp])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let vm = Self { child, dir };
        let start = Instant::now();
        // The socket is there before it is listened to.
        while UnixStream::connect(vm.qmp()).is_err() {
            assert!(start.elapsed() < LIMIT, "QEMU answers at its QMP socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        vm
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn attach(&self) -> Qemu {
        Qemu::attach(AttachOptions::new(self.qmp())).expect("attached")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(vm: &mut Qemu) -> String {
    let status = vm.execute("query-status", Value::Null).unwrap();
    status.get("status").and_then(Value::as_str).unwrap().to_owned()
}

fn monitor(vm: &mut Qemu, line: &str) -> String {
    let said = vm.execute("human-monitor-command", json!({ "command-line": line })).unwrap();
    said.as_str().unwrap().to_owned()
}

/// Waits until the firmware has made its ACPI tables and idles.
fn firmware_done(vm: &Qemu) {
    let start = Instant::now();
    loop {
        let mut area = vec![0; 0x2_0000];
        vm.phys().read(GuestPhys(0xe_0000), &mut area).unwrap();
        if area.chunks(16).any(|line| line.starts_with(b"RSD PTR ")) {
            break;
        }
        assert!(start.elapsed() < LIMIT, "the firmware makes ACPI tables");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn attach_leaves_no_trace() {
    let vm = Vm::boot(SHARED);
    let mut qemu = vm.attach();
    assert!(qemu.memory_is_mapped() && qemu.is_running() && !qemu.recovered());
    assert_eq!((qemu.vcpu_count(), qemu.pid()), (2, vm.child.id()));
    let chardevs = qemu.execute("query-chardev", Value::Null).unwrap().to_string();
    assert!(chardevs.contains("gdb.sock"));
    qemu.detach().unwrap();

    let mut qemu = vm.attach();
    assert_eq!(status(&mut qemu), "running");
    assert!(!qemu.recovered());
}

#[test]
fn memory_is_the_guests_mapped_or_not() {
    for (arguments, mapped) in [(SHARED, true), (PRIVATE, false)] {
        let vm = Vm::boot(arguments);
        let mut qemu = vm.attach();
        assert_eq!(qemu.memory_is_mapped(), mapped);
        firmware_done(&qemu);
        let last = qemu.phys().ranges().last().unwrap().clone();
        assert_eq!(last, GuestPhys(0x10_0000)..GuestPhys(64 << 20));
        qemu.stop().unwrap();
        // QEMU's own view of the same bytes.
        for (at, bytes) in [(0x20_0000u64, [1u8, 2, 3, 4]), (0x30_0ffe, [5, 6, 7, 8])] {
            qemu.write(GuestPhys(at), &bytes).unwrap();
            let word = u32::from_le_bytes(bytes);
            let said = monitor(&mut qemu, &format!("xp /1wx {at:#x}"));
            assert!(said.contains(&format!("{word:#010x}")), "{said}");
        }
        qemu.write_code(GuestPhys(0x20_0000), &[9; 5000]).unwrap();
        let mut back = vec![0; 5000];
        qemu.phys().read(GuestPhys(0x20_0000), &mut back).unwrap();
        assert!(back.iter().all(|&byte| byte == 9));
        assert!(qemu.write(GuestPhys(64 << 20), &[0]).is_err());
        assert!(qemu.write_code(GuestPhys((64 << 20) - 1), &[0, 0]).is_err());
    }
}

#[test]
fn ram_above_the_pci_hole_is_found() {
    let vm = Vm::boot(&[
        "-m",
        "4096",
        "-object",
        "memory-backend-memfd,id=ram,size=4G,share=on",
        "-machine",
        "q35,memory-backend=ram",
    ]);
    let mut qemu = vm.attach();
    let above = qemu.phys().ranges().last().unwrap().clone();
    assert_eq!(above, GuestPhys(4 << 30)..GuestPhys(6 << 30), "q35 splits at 2 GiB");
    qemu.stop().unwrap();
    qemu.write(GuestPhys((5 << 30) + 8), &0x1122_3344u32.to_le_bytes()).unwrap();
    assert!(monitor(&mut qemu, "xp /1wx 0x140000008").contains("0x11223344"));
}

#[test]
fn registers_and_tables() {
    let vm = Vm::boot(PRIVATE);
    let mut qemu = vm.attach();
    assert!(matches!(qemu.registers(Vcpu(0)), Err(MachineError::Backend { .. })), "it runs");
    firmware_done(&qemu);
    qemu.stop().unwrap();
    let before = qemu.registers(Vcpu(1)).unwrap();
    let wanted = before.with(Reg::R15, 0x1234_5678_9abc_def0).with(Reg::Cr2, 0x42);
    qemu.set_registers(Vcpu(1), &wanted).unwrap();
    assert!(monitor(&mut qemu, "info registers -a").contains("CR2=00000042"));
    qemu.set_registers(Vcpu(1), &before).unwrap();
    assert!(matches!(qemu.registers(Vcpu(2)), Err(MachineError::NoSuchVcpu(Vcpu(2)))));
    let tables = qemu.cpu_tables(Vcpu(0)).unwrap();
    // Whatever mode the firmware is in, and with whichever tables.
    let said = monitor(&mut qemu, "info registers");
    for (name, table) in [("GDT", tables.gdt), ("IDT", tables.idt)] {
        let line = format!("{name}=     {:08x} {:08x}", table.base.0, table.limit);
        assert!(said.contains(&line), "{line} is not in {said}");
    }
}

#[test]
fn fresh_memory_comes_and_goes() {
    for machine in ["pc,memory-backend=ram", "q35,memory-backend=ram"] {
        let mut arguments = SHARED.to_vec();
        arguments[5] = machine;
        let vm = Vm::boot(&arguments);
        let mut options = AttachOptions::new(vm.qmp());
        options.fresh_order = vec![FreshKind::HotAdded];
        let mut qemu = Qemu::attach(options).expect("attached");
        firmware_done(&qemu);
        qemu.stop().unwrap();
        // Looks for the hot-plug ports, which the firmware has placed by now.
        qemu.arm(&[]).unwrap();
        let ranges = qemu.phys().ranges();
        for round in 1..=50u8 {
            let region = qemu.add(10_000).unwrap();
            assert_eq!((region.kind, region.size), (FreshKind::HotAdded, 2 << 20));
            let mut page = [1; 4096];
            qemu.phys().read(region.at, &mut page).unwrap();
            assert_eq!(page, [0; 4096], "zeroed");
            qemu.write_code(region.at, &[round; 100]).unwrap();
            let said = monitor(&mut qemu, &format!("xp /1bx {:#x}", region.at));
            assert!(said.contains(&format!("{round:#04x}")), "{said}");
            qemu.remove(region).unwrap();
            assert!(qemu.phys().read(region.at, &mut page).is_err());
            assert!(qemu.remove(region).is_err(), "twice");
        }
        assert_eq!(qemu.phys().ranges(), ranges);
        let devices = qemu.execute("query-memory-devices", Value::Null).unwrap();
        let backends = qemu.execute("query-memdev", Value::Null).unwrap();
        assert_eq!((devices.as_array().unwrap().len(), backends.as_array().unwrap().len()), (0, 1));
        let events = qemu.take_events().unwrap();
        assert!(events.iter().all(|event| !event.name.contains("OST")), "{events:?}");
    }
}

#[test]
fn without_slots_the_firmware_tail_serves() {
    let vm = Vm::boot(PRIVATE);
    let mut qemu = vm.attach();
    firmware_done(&qemu);
    // The tables are written after the pointer to them.
    std::thread::sleep(Duration::from_millis(500));
    qemu.stop().unwrap();
    let region = qemu.add(64 << 10).unwrap();
    assert_eq!(region.kind, FreshKind::FirmwareTail);
    assert!(region.at.0 >= (64 << 20) - (256 << 10));
    qemu.write_code(region.at, &[7; 64]).unwrap();
    let second = qemu.add(64 << 10).unwrap_err();
    let text = std::error::Error::source(&second).unwrap().to_string();
    assert!(text.contains("slots") && text.contains("in use already"), "{text}");
    qemu.remove(region).unwrap();
    let mut bytes = [1; 64];
    qemu.phys().read(region.at, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64], "put back");
    // The same code as before goes past QEMU, other code does not: both are there.
    for code in [[7; 64], [8; 64], [8; 64], [7; 64]] {
        let region = qemu.add(64 << 10).unwrap();
        qemu.write_code(region.at, &code).unwrap();
        qemu.phys().read(region.at, &mut bytes).unwrap();
        assert_eq!(bytes, code);
        qemu.remove(region).unwrap();
    }
}

/// Puts `code` at guest-physical 0x8000 and vCPU 0 there, in the mode the firmware idles in.
fn place(qemu: &mut Qemu, code: &[u8]) -> guest::Registers {
    let regs = qemu.registers(Vcpu(0)).unwrap();
    qemu.write_code(GuestPhys(0x8000), code).unwrap();
    // A flat 16-bit or 32-bit code segment: the linear address is what the stub calls rip plus the base.
    regs.with(Reg::Rip, 0x8000).with(Reg::Rflags, 2)
}

#[test]
fn hooks_are_hit_and_passed_and_calls_end() {
    let vm = Vm::boot(SHARED);
    let mut qemu = vm.attach();
    firmware_done(&qemu);
    std::thread::sleep(Duration::from_millis(500));
    qemu.stop().unwrap();
    // A vCPU that sleeps does not run when it is moved, so this must be the one in a breakpoint: the firmware
    // waits for a key in a loop; any stop of vCPU 0 outside of `hlt` will do.
    let mut tries = 0;
    while qemu.cpu_tables(Vcpu(0)).unwrap().halted {
        tries += 1;
        assert!(tries < 2000, "vCPU 0 is never awake");
        qemu.resume().unwrap();
        std::thread::sleep(Duration::from_micros(tries * 37 % 1000));
        qemu.stop().unwrap();
    }
    let real_mode = qemu.registers(Vcpu(0)).unwrap().get(Reg::Cr0).unwrap() & 1 == 0;
    let mut regs = place(&mut qemu, &[0x90, 0x90, 0x90, 0x90, 0xeb, 0xfa]);
    if real_mode {
        regs.set(Reg::Cs, 0);
    }
    // nop; nop; nop; nop; jmp to the first: with a hook on the second.
    let hook = Hook { kind: HookKind::Panic, at: GuestVirt(0x8001) };
    qemu.arm(&[hook]).unwrap();
    qemu.set_registers(Vcpu(0), &regs).unwrap();
    qemu.resume().unwrap();
    for _ in 0..5 {
        let stop = qemu.wait(LIMIT).unwrap().expect("a stop");
        assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::Hook(hook)));
        assert_eq!(qemu.registers(Vcpu(0)).unwrap().rip(), Some(hook.at));
        // A call from there and back does not make it forget that this hook was reported.
        let away = regs.with(Reg::Rip, 0x8002);
        let outcome = qemu.run_until(Vcpu(0), &away, GuestVirt(0x8004), LIMIT).unwrap();
        assert!(matches!(outcome, CallOutcome::Reached(at) if at.rip() == Some(GuestVirt(0x8004))));
        qemu.set_registers(Vcpu(0), &regs.with(Reg::Rip, 0x8001)).unwrap();
        qemu.resume().unwrap();
    }
    qemu.wait(LIMIT).unwrap().expect("a stop");
    let crash = qemu.run_until(Vcpu(0), &regs, GuestVirt(0x8004), LIMIT).unwrap();
    assert_eq!(crash, CallOutcome::Crashed(hook));
    qemu.disarm().unwrap();
    let short = Duration::from_millis(50);
    let late = qemu.run_until(Vcpu(0), &regs, GuestVirt(0x9000), short);
    assert!(matches!(late, Err(MachineError::Timeout { .. })));
    assert!(!qemu.is_running());
    // While the other vCPU stands, this one runs to what it meets, and stays there.
    qemu.arm(&[hook]).unwrap();
    qemu.set_registers(Vcpu(0), &regs).unwrap();
    assert!(qemu.run_others(Vcpu(1), LIMIT).unwrap());
    assert!(!qemu.is_running());
    let stop = qemu.wait(LIMIT).unwrap().expect("a stop");
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::Hook(hook)));
    assert!(qemu.run_others(Vcpu(1), LIMIT).unwrap(), "it stands on a hook");
    assert!(!qemu.run_others(Vcpu(0), short).unwrap(), "the other has nothing to do");
    assert_eq!(qemu.registers(Vcpu(0)).unwrap().rip(), Some(hook.at));
}

#[test]
fn a_reset_is_reported_and_stands() {
    let vm = Vm::boot(SHARED);
    let mut qemu = vm.attach();
    firmware_done(&qemu);
    qemu.stop().unwrap();
    qemu.arm(&[Hook { kind: HookKind::Panic, at: GuestVirt(0xdead) }]).unwrap();
    qemu.add(1).unwrap();
    qemu.resume().unwrap();
    assert_eq!(qemu.wait(Duration::from_millis(50)).unwrap(), None);
    qemu.execute("system_reset", Value::Null).unwrap();
    let stop = qemu.wait(LIMIT).unwrap().expect("a stop");
    assert_eq!(stop.reason, StopReason::Reset);
    assert!(!qemu.is_running());
    let devices = qemu.execute("query-memory-devices", Value::Null).unwrap();
    assert_eq!(devices, json!([]), "fresh memory is gone");
    qemu.resume().unwrap();
    // SeaBIOS may find that it has run before, and reset the board once more by itself (`handle_post()`).
    while let Some(stop) = qemu.wait(Duration::from_millis(50)).unwrap() {
        assert_eq!(stop.reason, StopReason::Reset);
        qemu.resume().unwrap();
    }
    qemu.execute("quit", Value::Null).unwrap();
    let mut end = qemu.wait(LIMIT).unwrap().map(|stop| stop.reason);
    if end == Some(StopReason::Reset) {
        end = qemu.wait(LIMIT).unwrap().map(|stop| stop.reason);
    }
    assert_eq!(end, Some(StopReason::Gone));
    assert!(matches!(qemu.execute("query-status", Value::Null), Err(Error::Gone)));
}

#[test]
fn pauses_by_others_are_foreign() {
    let vm = Vm::boot(PRIVATE);
    let mut qemu = vm.attach();
    qemu.execute("stop", Value::Null).unwrap();
    let stop = qemu.wait(LIMIT).unwrap().expect("a stop");
    assert_eq!(stop.reason, StopReason::Foreign);
    qemu.execute("cont", Value::Null).unwrap();
    assert_eq!(qemu.wait(Duration::from_millis(200)).unwrap(), None);
    assert!(qemu.is_running(), "resumed by the other");
    qemu.stop().unwrap();
    qemu.registers(Vcpu(0)).unwrap();
}

#[test]
fn unfit_vms_are_refused() {
    let vm = Vm::boot(PRIVATE);
    let qemu = vm.attach();
    assert!(matches!(
        Qemu::attach(AttachOptions::new(vm.qmp())),
        Err(Error::AlreadyGuarded { pid, .. }) if pid == vm.child.id()
    ));
    qemu.detach().unwrap();
    let missing = Qemu::attach(AttachOptions::new("/nonexistent"));
    assert!(matches!(missing, Err(Error::Connect { .. })));

    let paused = Vm::boot(&["-m", "64", "-S"]);
    let refused = Qemu::attach(AttachOptions::new(paused.qmp())).err();
    let stands = matches!(&refused, Some(Error::NotRunning { status }) if status == "prelaunch");
    assert!(stands, "{refused:?}");
    let mut options = AttachOptions::new(paused.qmp());
    options.take_over_paused = true;
    let mut taken = Qemu::attach(options).unwrap();
    assert!(!taken.is_running());
    taken.resume().unwrap();
    assert_eq!(status(&mut taken), "running");
}

#[test]
fn a_stub_of_the_owner_is_only_used_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let gdb = dir.path().join("gdb");
    let vm = Vm::boot(&["-m", "64", "-gdb", &format!("unix:{},server=on,wait=off", gdb.display())]);
    let refused = Qemu::attach(AttachOptions::new(vm.qmp()));
    assert!(matches!(refused, Err(Error::StubInUse { endpoint }) if endpoint.contains("gdb")));
    let mut options = AttachOptions::new(vm.qmp());
    options.gdb = Some(gdb);
    let mut qemu = Qemu::attach(options.clone()).unwrap();
    qemu.stop().unwrap();
    assert!(qemu.registers(Vcpu(0)).unwrap().rip().is_some());
    qemu.detach().unwrap();
    // Still on, and the VM runs.
    let mut qemu = Qemu::attach(options).unwrap();
    assert_eq!(status(&mut qemu), "running");
}

/// The body of the process that is killed by the next test; does nothing in an ordinary run.
#[test]
fn killed_guard() {
    let Some(socket) = std::env::var_os("DEFIB_TEST_KILLED_GUARD") else { return };
    let mut qemu = Qemu::attach(AttachOptions::new(PathBuf::from(socket))).unwrap();
    firmware_done(&qemu);
    qemu.stop().unwrap();
    qemu.arm(&[Hook { kind: HookKind::Panic, at: GuestVirt(0xdead) }]).unwrap();
    qemu.add(1).unwrap();
    if std::env::var_os("DEFIB_TEST_RUNNING").is_some() {
        qemu.resume().unwrap();
    }
    std::fs::write(std::env::var_os("DEFIB_TEST_READY").unwrap(), b"").unwrap();
    std::thread::sleep(LIMIT);
}

fn kill_a_guard(vm: &Vm, ready: &Path, running: bool) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "killed_guard"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("DEFIB_TEST_KILLED_GUARD", vm.qmp()).env("DEFIB_TEST_READY", ready);
    if running {
        command.env("DEFIB_TEST_RUNNING", "1");
    }
    let mut guard = command.spawn().unwrap();
    let start = Instant::now();
    while !ready.exists() {
        assert!(start.elapsed() < LIMIT, "the guard attaches");
        std::thread::sleep(Duration::from_millis(10));
    }
    guard.kill().unwrap();
    guard.wait().unwrap();
}

#[test]
fn a_killed_guard_is_cleaned_up_after() {
    for running in [true, false] {
        let vm = Vm::boot(SHARED);
        let ready = vm.dir.path().join("ready");
        kill_a_guard(&vm, &ready, running);
        let mut qemu = vm.attach();
        assert!(qemu.recovered() && qemu.is_running());
        assert_eq!(status(&mut qemu), "running");
        assert_eq!(qemu.execute("query-memory-devices", Value::Null).unwrap(), json!([]));
        qemu.detach().unwrap();
        assert!(!vm.attach().recovered(), "nothing is left");
    }
}
