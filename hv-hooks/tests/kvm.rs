//! The KVM backend against this host's KVM, with guests of a few instructions on two vCPUs. Where there is no KVM, the
//! tests are shown as ignored.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use defib_hv_hooks::Error;
use defib_hv_hooks::kvm::dirty::{self, DirtyPages};
use defib_hv_hooks::kvm::{GuestRam, HostKind, KvmMachine};
use guest::{
    Call, CallOutcome, Control, FreshMemory, GuestPhys, GuestVirt, Hook, HookKind, Hooks, Machine,
    MachineError, Reg, Registers, Stop, StopReason, Vcpu, WriteMemory,
};
use libtest_mimic::{Arguments, Trial};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

mod tiny_vm;
use tiny_vm::{Begin, LIMIT, Options, TinyVm, at};

type Kvm = KvmMachine<GuestMemoryMmap>;

fn main() {
    let arguments = Arguments::from_args();
    let host = HostKind::detect();
    println!("{host}");
    let trial = |(name, test): (&str, fn())| {
        let run = move || {
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(!host.is_usable())
    };
    let trials = TESTS.iter().copied().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

macro_rules! tests {
    ($($name:ident)*) => { const TESTS: &[(&str, fn())] = &[$((stringify!($name), $name)),*]; };
}
tests! {
    stop_and_resume_race_with_every_kind_of_vcpu stopped_registers_stand_still registers_round_trip
    hook_is_met_and_passed both_vcpus_meet_a_hook_at_once disarmed_hooks_do_nothing
    hooks_under_vcpus_that_run_freely calls_return_registers calls_with_four_hooks calls_that_crash
    calls_that_do_not_end call_wakes_a_sleeper other_vcpus_run_and_stop_during_a_call
    others_run_while_one_stands
    a_vcpu_that_does_not_come a_vcpu_that_was_not_started a_vcpu_whose_thread_ends
    fresh_memory_comes_and_goes
    fresh_memory_collides memslots_in_use_are_left_alone triple_fault_is_the_guards_first
    what_kvm_cannot_run panic_is_told_by_the_vmm reset_voids_hooks_and_fresh_memory
    an_ended_vm_lets_everybody_go dropping_lets_the_guest_run real_mode_at_a_hook dirty_log dirty_ring
    the_guests_own_debug_exceptions a_moved_vcpu_does_not_meet_the_hook_again
}

fn hook(kind: HookKind, at: GuestVirt) -> Hook {
    Hook { kind, at }
}

fn panic_hook() -> Hook {
    hook(HookKind::Panic, at::hooked())
}

fn wait(machine: &mut Kvm) -> Stop {
    machine.wait(LIMIT).expect("no error while waiting").expect("a stop")
}

fn get(machine: &mut Kvm, vcpu: usize, reg: Reg) -> u64 {
    machine.registers(Vcpu(vcpu)).unwrap().get(reg).unwrap()
}

fn backend(error: &MachineError) -> String {
    match error {
        MachineError::Backend { backend, source } => format!("{backend}: {source}"),
        other => panic!("{other:?}"),
    }
}

/// Lets a machine that stands run for a moment at a time until something holds; it stands then.
fn run_till(machine: &mut Kvm, what: &str, mut holds: impl FnMut(&mut Kvm) -> bool) {
    let start = Instant::now();
    while !holds(machine) {
        assert!(start.elapsed() < LIMIT, "{what}");
        machine.resume().unwrap();
        assert_eq!(machine.wait(Duration::from_millis(1)).unwrap(), None, "{what}");
        machine.stop().unwrap();
    }
}

fn armed(begins: &[GuestVirt], hooks: &[Hook]) -> (TinyVm, Kvm) {
    let (vm, mut machine) = TinyVm::start(begins);
    machine.stop().unwrap();
    machine.arm(hooks).unwrap();
    machine.resume().unwrap();
    (vm, machine)
}

fn stop_and_resume_race_with_every_kind_of_vcpu() {
    let kinds = [
        [at::sleep(), at::spin()],
        [at::talk(), at::talk()],
        [at::spin(), at::talk()],
        [at::sleep(), at::sleep()],
    ];
    for kind in kinds {
        let (vm, mut machine) = TinyVm::start(&kind);
        for round in 0..1000u32 {
            machine.stop().unwrap();
            assert!(!machine.is_running());
            if round % 64 == 0 {
                machine.registers(Vcpu(0)).unwrap();
                machine.registers(Vcpu(1)).unwrap();
            }
            machine.resume().unwrap();
            assert!(machine.is_running());
            // Now and then at once, now and then in the middle of something.
            if round % 3 == 0 {
                std::thread::sleep(Duration::from_micros(u64::from(round % 97)));
            }
        }
        assert_eq!(machine.wait(Duration::ZERO).unwrap(), None);
        assert!(vm.host.errors.lock().unwrap().is_empty());
        drop(vm);
    }
}

fn stopped_registers_stand_still() {
    let (vm, mut machine) = TinyVm::start(&[at::spin(), at::talk()]);
    vm.until("the guest runs", |host| host.talks.load(Ordering::Relaxed) > 10);
    machine.stop().unwrap();
    let before = [get(&mut machine, 0, Reg::Rbx), get(&mut machine, 1, Reg::Rbx)];
    let talks = vm.host.talks.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(before, [get(&mut machine, 0, Reg::Rbx), get(&mut machine, 1, Reg::Rbx)]);
    assert_eq!(vm.host.talks.load(Ordering::Relaxed), talks);
    // The last I/O is complete: past it, the guest has yet to count it, and else it has.
    let uncounted = u64::from(get(&mut machine, 1, Reg::Rip) == at::talk().0 + 2);
    assert_eq!(get(&mut machine, 1, Reg::Rbx) + uncounted, talks);
    machine.resume().unwrap();
    vm.until("the guest goes on", |host| host.talks.load(Ordering::Relaxed) > talks);
    assert!(matches!(machine.registers(Vcpu(0)), Err(MachineError::Backend { .. })));
    assert!(matches!(machine.registers(Vcpu(7)), Err(MachineError::Backend { .. })));
}

fn registers_round_trip() {
    let (_vm, mut machine) = TinyVm::start(&[at::spin(), at::sleep()]);
    machine.stop().unwrap();
    let before = machine.registers(Vcpu(0)).unwrap();
    for reg in Reg::ALL {
        assert!(before.get(*reg).is_some(), "{} is not told", reg.name());
    }
    let mut wanted = Registers::unknown();
    for (index, reg) in Reg::GENERAL.into_iter().enumerate() {
        wanted.set(reg, 0x1111_1111_1111_1111u64.wrapping_mul(index as u64 + 1));
    }
    let others = [
        (Reg::FsBase, 0xffff_8000_0000_1000),
        (Reg::GsBase, 0xffff_8000_0000_2000),
        (Reg::KernelGsBase, 0xffff_8000_0000_3000),
        (Reg::Lstar, 0xffff_ffff_8100_0000),
        (Reg::Cstar, 0xffff_ffff_8100_1000),
        (Reg::Star, 0x0023_0010_0000_0000),
        (Reg::Fmask, 0x4_7700),
        (Reg::Cr2, 0x1234_5000),
        (Reg::IdtBase, 0x5000),
        (Reg::GdtBase, 0x6000),
        (Reg::TrBase, 0x7000),
    ];
    others.into_iter().for_each(|(reg, value)| wanted.set(reg, value));
    machine.set_registers(Vcpu(0), &wanted).unwrap();
    let mut expected = before;
    expected.overlay(&wanted);
    assert_eq!(machine.registers(Vcpu(0)).unwrap(), expected);
    // The other way round, and the guest still runs.
    machine.set_registers(Vcpu(0), &before).unwrap();
    assert_eq!(machine.registers(Vcpu(0)).unwrap(), before);
    let counted = before.get(Reg::Rbx).unwrap();
    run_till(&mut machine, "it counts on", |machine| get(machine, 0, Reg::Rbx) > counted);
}

fn hook_is_met_and_passed() {
    let (_vm, mut machine) = armed(&[at::hooking(), at::spin()], &[panic_hook()]);
    let mut last = None;
    for round in 0..200 {
        let stop = wait(&mut machine);
        assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::Hook(panic_hook())));
        assert!(!machine.is_running());
        let regs = machine.registers(Vcpu(0)).unwrap();
        assert_eq!(regs.rip(), Some(at::hooked()));
        // Each call is met once, before its first instruction.
        let count = (regs.get(Reg::Rbx).unwrap(), regs.get(Reg::Rcx).unwrap());
        if let Some((calls, entries)) = last {
            assert_eq!(count, (calls + 1, entries + 1), "round {round}");
        }
        last = Some(count);
        machine.resume().unwrap();
        if round % 5 == 0 {
            // In the middle of the pass, perhaps.
            machine.stop().unwrap();
            machine.resume().unwrap();
        }
    }
}

fn both_vcpus_meet_a_hook_at_once() {
    let (_vm, mut machine) = armed(&[at::hooking(), at::hooking()], &[panic_hook()]);
    let mut met = [0u64; 2];
    let mut last = [None; 2];
    for _ in 0..300 {
        let stop = wait(&mut machine);
        assert_eq!(stop.reason, StopReason::Hook(panic_hook()));
        let vcpu = stop.vcpu.0;
        met[vcpu] += 1;
        // Neither vCPU ever gets past the hook unseen.
        let entries = get(&mut machine, vcpu, Reg::Rcx);
        if let Some(before) = last[vcpu] {
            assert_eq!(entries, before + 1);
        }
        last[vcpu] = Some(entries);
        machine.resume().unwrap();
    }
    assert!(met[0] > 50 && met[1] > 50, "{met:?}");
}

fn disarmed_hooks_do_nothing() {
    let (vm, mut machine) = armed(&[at::hooking(), at::hooking()], &[panic_hook()]);
    let stop = wait(&mut machine);
    // The other one may have met it in the same moment; that is void now.
    machine.disarm().unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait(Duration::from_millis(30)).unwrap(), None);
    machine.stop().unwrap();
    let vcpu = stop.vcpu.0;
    run_till(&mut machine, "it passes", |machine| get(machine, vcpu, Reg::Rcx) > 2);
    assert!(vm.host.errors.lock().unwrap().is_empty());
}

fn hooks_under_vcpus_that_run_freely() {
    // Disarming also works while the guest runs, as the last thing a guard that fails does.
    let (_vm, mut machine) =
        armed(&[at::spin(), at::hooking()], &[hook(HookKind::Panic, at::h1())]);
    machine.disarm().unwrap();
    assert_eq!(machine.wait(Duration::from_millis(10)).unwrap(), None);
    let too_many = [hook(HookKind::Panic, at::h1()); 5];
    machine.stop().unwrap();
    let error = machine.arm(&too_many).unwrap_err();
    assert_eq!(backend(&error), "kvm: 5 hooks, but a vCPU has four debug registers");
}

fn call_registers(machine: &mut Kvm, at: GuestVirt) -> Registers {
    let regs = machine.registers(Vcpu(0)).unwrap();
    let regs = regs.with(Reg::Rip, at.0).with(Reg::Rsp, 0x9_f000);
    regs.with(Reg::Rdi, 40).with(Reg::Rsi, 2)
}

fn reached(outcome: CallOutcome) -> Registers {
    match outcome {
        CallOutcome::Reached(regs) => regs,
        CallOutcome::Crashed(hook) => panic!("crashed at {hook:?}"),
    }
}

fn calls_return_registers() {
    let (_vm, mut machine) = armed(&[at::hooking(), at::spin()], &[panic_hook()]);
    let stop = wait(&mut machine);
    assert_eq!(stop.vcpu, Vcpu(0));
    let before = machine.registers(Vcpu(0)).unwrap();
    for _ in 0..100 {
        let regs = call_registers(&mut machine, at::function());
        let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
        let regs = reached(outcome);
        assert_eq!((regs.get(Reg::Rax), regs.rip()), (Some(42), Some(at::function_end())));
        assert!(!machine.is_running());
    }
    // Back to where it was met; from there it is met again, since it was away.
    machine.set_registers(Vcpu(0), &before).unwrap();
    machine.resume().unwrap();
    assert_eq!(wait(&mut machine).reason, StopReason::Hook(panic_hook()));
}

fn all_four() -> [Hook; 4] {
    [
        hook(HookKind::OopsBegin, at::h1()),
        panic_hook(),
        hook(HookKind::DoubleFault, at::h2()),
        hook(HookKind::StackOverflow, at::h3()),
    ]
}

fn calls_with_four_hooks() {
    let (_vm, mut machine) = armed(&[at::hooking(), at::spin()], &all_four());
    wait(&mut machine);
    // The call passes h3, whose debug register was lent to the end of the call.
    let regs = call_registers(&mut machine, at::four());
    let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
    assert_eq!(reached(outcome).get(Reg::Rax), Some(42));
    let regs = call_registers(&mut machine, at::crashing());
    let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
    assert_eq!(outcome, CallOutcome::Crashed(panic_hook()));
    // Afterwards all four are in place.
    machine.set_registers(Vcpu(0), &call_registers_to(at::h3())).unwrap();
    machine.resume().unwrap();
    assert_eq!(wait(&mut machine).reason, StopReason::Hook(all_four()[3]));
}

fn call_registers_to(at: GuestVirt) -> Registers {
    Registers::unknown().with(Reg::Rip, at.0)
}

fn calls_that_crash() {
    let (_vm, mut machine) = armed(&[at::sleep(), at::spin()], &[panic_hook()]);
    machine.stop().unwrap();
    let regs = call_registers(&mut machine, at::crashing());
    let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
    assert_eq!(outcome, CallOutcome::Crashed(panic_hook()));
    assert!(!machine.is_running());
    // It passes the hook when the guest is resumed, and is not told again.
    let end = at::function_end().0;
    run_till(&mut machine, "it returns", |machine| {
        (end..end + 3).contains(&get(machine, 0, Reg::Rip))
    });
    // A call that ends in a triple fault is an error, and the stop is told.
    let regs = call_registers(&mut machine, at::triple());
    let error = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap_err();
    assert!(backend(&error).contains("TripleFault"), "{error:?}");
    assert_eq!(wait(&mut machine).reason, StopReason::TripleFault);
}

fn calls_that_do_not_end() {
    let (_vm, mut machine) = TinyVm::start(&[at::spin(), at::spin()]);
    machine.stop().unwrap();
    let regs = call_registers(&mut machine, at::spin());
    let start = Instant::now();
    let limit = Duration::from_millis(50);
    let error = machine.run_until(Vcpu(0), &regs, at::function_end(), limit).unwrap_err();
    assert!(matches!(error, MachineError::Timeout { .. }), "{error:?}");
    assert!(start.elapsed() >= limit && start.elapsed() < LIMIT && !machine.is_running());
    // The end is no breakpoint any more.
    machine.set_registers(Vcpu(0), &call_registers_to(at::function())).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait(Duration::from_millis(20)).unwrap(), None);
}

fn call_wakes_a_sleeper() {
    let (_vm, mut machine) = TinyVm::start(&[at::sleep(), at::sleep()]);
    std::thread::sleep(Duration::from_millis(10));
    machine.stop().unwrap();
    let regs = call_registers(&mut machine, at::function());
    let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
    assert_eq!(reached(outcome).get(Reg::Rax), Some(42));
}

fn others_run_while_one_stands() {
    let (_vm, mut machine) = armed(&[at::spin(), at::spin()], &[panic_hook()]);
    machine.stop().unwrap();
    let counts = |machine: &mut Kvm| [0, 1].map(|vcpu| get(machine, vcpu, Reg::Rbx));
    let before = counts(&mut machine);
    let met = machine.run_others(Vcpu(0), Duration::from_millis(20)).unwrap();
    let after = counts(&mut machine);
    assert!(!met && !machine.is_running());
    assert!(after[0] == before[0] && after[1] != before[1], "{before:?} {after:?}");
    // What one of them meets ends it, and is told next.
    let onto = Registers::unknown().with(Reg::Rip, at::hooking().0);
    machine.set_registers(Vcpu(1), &onto).unwrap();
    assert!(machine.run_others(Vcpu(0), LIMIT).unwrap());
    assert!(machine.run_others(Vcpu(0), LIMIT).unwrap(), "it was not told yet");
    assert_eq!(counts(&mut machine)[0], before[0]);
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(1), StopReason::Hook(panic_hook())));
}

fn other_vcpus_run_and_stop_during_a_call() {
    let (_vm, mut machine) = armed(&[at::sleep(), at::spin()], &[panic_hook()]);
    machine.stop().unwrap();
    let before = get(&mut machine, 1, Reg::Rbx);
    let (limit, end) = (Duration::from_millis(20), at::function_end());
    let regs = call_registers(&mut machine, at::spin());
    let call = |machine: &mut Kvm| {
        let error = machine.run_until(Vcpu(0), &regs, end, limit).unwrap_err();
        assert!(matches!(error, MachineError::Timeout { .. }), "{error:?}");
    };
    let start = Instant::now();
    while get(&mut machine, 1, Reg::Rbx) <= before {
        assert!(start.elapsed() < LIMIT, "the other vCPU runs");
        call(&mut machine);
    }
    // Another vCPU that meets a hook meanwhile does not end the call; it stands and is told afterwards.
    machine.set_registers(Vcpu(1), &call_registers_to(at::hooking())).unwrap();
    while get(&mut machine, 1, Reg::Rip) != at::hooked().0 {
        assert!(start.elapsed() < LIMIT, "the other vCPU meets the hook");
        call(&mut machine);
    }
    let entries = get(&mut machine, 1, Reg::Rcx);
    let regs = call_registers(&mut machine, at::function());
    reached(machine.run_until(Vcpu(0), &regs, end, LIMIT).unwrap());
    assert_eq!(get(&mut machine, 1, Reg::Rcx), entries, "it stands during further calls");
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(1), StopReason::Hook(panic_hook())));
    // Told once, it still stays during calls and passes when the guest is resumed.
    let regs = call_registers(&mut machine, at::function());
    reached(machine.run_until(Vcpu(0), &regs, end, LIMIT).unwrap());
    assert_eq!(get(&mut machine, 1, Reg::Rcx), entries);
    machine.resume().unwrap();
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, get(&mut machine, 1, Reg::Rcx)), (Vcpu(1), entries + 1));
}

fn a_vcpu_that_does_not_come() {
    let (mut vm, machine) =
        TinyVm::new(&[Begin::Long(at::talk()), Begin::Long(at::blocking())], Options::default());
    let mut machine = machine.unwrap();
    vm.host.block.store(true, Ordering::Release);
    vm.run();
    vm.until("the vCPU is in the VMM's code", |host| host.blocked.load(Ordering::Acquire));
    let start = Instant::now();
    let error = machine.stop().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(backend(&error).starts_with("kvm: vCPU 1 did not stop within 1s"), "{error:?}");
    // All others run on as before.
    assert!(machine.is_running());
    let talks = vm.host.talks.load(Ordering::Relaxed);
    vm.until("the other runs on", |host| host.talks.load(Ordering::Relaxed) > talks);
    vm.host.block.store(false, Ordering::Release);
    std::thread::sleep(Duration::from_millis(5));
    machine.stop().unwrap();
    machine.resume().unwrap();
    // Letting go does not need it either.
    drop(machine);
    let talks = vm.host.talks.load(Ordering::Relaxed);
    vm.until("the guest runs", |host| host.talks.load(Ordering::Relaxed) > talks);
    vm.end();
    assert!(vm.host.errors.lock().unwrap().is_empty());
}

fn a_vcpu_that_was_not_started() {
    let begins = [Begin::Long(at::talk()), Begin::Long(at::talk())];
    let (mut vm, machine) = TinyVm::new(&begins, Options::default());
    let mut machine = machine.unwrap();
    let error = machine.stop().unwrap_err();
    assert!(backend(&error).contains("enter()"), "{error:?}");
    vm.run();
    vm.until("the guest runs", |host| host.talks.load(Ordering::Relaxed) > 0);
    machine.stop().unwrap();
    vm.end();
    assert!(matches!(machine.registers(Vcpu(0)), Err(MachineError::Gone)));
    assert_eq!(wait(&mut machine).reason, StopReason::Gone);
}

fn a_vcpu_whose_thread_ends() {
    let (vm, mut machine) = TinyVm::start(&[at::talk(), at::spin()]);
    machine.stop().unwrap();
    vm.host.vanish.store(true, Ordering::Release);
    machine.resume().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // It never runs again, so the machine can stand; but nobody can tell its registers.
    machine.stop().unwrap();
    machine.registers(Vcpu(0)).unwrap();
    let gone = "kvm: the thread of vCPU 1 has ended";
    assert_eq!(backend(&machine.registers(Vcpu(1)).unwrap_err()), gone);
    let regs = call_registers(&mut machine, at::function());
    let error = machine.run_until(Vcpu(1), &regs, at::function_end(), LIMIT).unwrap_err();
    assert_eq!(backend(&error), gone);
    reached(machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap());
}

fn fresh_memory_comes_and_goes() {
    let (_vm, mut machine) = TinyVm::start(&[at::sleep(), at::spin()]);
    assert!(backend(&machine.add(1).unwrap_err()).contains("running"));
    machine.stop().unwrap();
    let ranges = machine.phys().ranges();
    let region = machine.add(64 << 10).unwrap();
    assert_eq!((region.at, region.size), (GuestPhys(1 << 32), 64 << 10));
    assert_eq!(machine.phys().ranges().len(), ranges.len() + 1);
    assert_eq!(machine.phys().read_u64(region.at).unwrap(), 0);
    machine.write(region.at, &0x5eed_u64.to_le_bytes()).unwrap();
    machine.write_code(region.at + 8, &[0x90; 3]).unwrap();
    // The guest sees it.
    let regs = call_registers(&mut machine, at::far_read()).with(Reg::Rdi, region.at.0);
    let outcome = machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT).unwrap();
    assert_eq!(reached(outcome).get(Reg::Rax), Some(0x5eed));
    let second = machine.add(1).unwrap();
    assert!(second.at >= region.at + region.size);
    machine.remove(region).unwrap();
    machine.remove(second).unwrap();
    assert_eq!(machine.phys().ranges(), ranges);
    assert!(machine.phys().read_u64(region.at).is_err());
    assert!(machine.remove(region).is_err());
    // Zeroed each time.
    let again = machine.add(64 << 10).unwrap();
    assert_eq!(machine.phys().read_u64(again.at).unwrap(), 0);
}

fn fresh_memory_collides() {
    let window = GuestPhys(1 << 32)..GuestPhys((1 << 32) + (3 << 21) + 1);
    let options = Options { reserved: vec![window.clone()], ..Options::default() };
    let begins = [Begin::Long(at::spin()), Begin::Long(at::spin())];
    let (mut vm, machine) = TinyVm::new(&begins, options);
    let mut machine = machine.unwrap();
    vm.run();
    machine.stop().unwrap();
    let region = machine.add(4096).unwrap();
    assert_eq!(region.at, GuestPhys((1 << 32) + (4 << 21)), "past the reserved window");
    machine.remove(region).unwrap();
    // A memslot that the VMM did not tell of is where it would go: KVM says so, and another place is taken.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(region.at.0), 4096)]).unwrap();
    let _secret = GuestRam::map(Arc::clone(&vm.vm), memory, 3..4).unwrap();
    let elsewhere = machine.add(4096).unwrap();
    assert!(elsewhere.at > region.at, "{elsewhere:?}");
    drop(machine);

    // A guest whose addresses have 32 bits has no place above 4 GiB.
    let options = Options { address_bits: Some(32), ..Options::default() };
    let (mut vm, machine) = TinyVm::new(&begins, options);
    let mut machine = machine.unwrap();
    vm.run();
    machine.stop().unwrap();
    let error = backend(&machine.add(4096).unwrap_err());
    assert!(error.contains("no place for 0x1000 bytes") && error.contains("32 bits"), "{error}");
}

fn memslots_in_use_are_left_alone() {
    let (vm, mut machine) = TinyVm::start(&[at::spin(), at::spin()]);
    // The VMM uses all slots that it left to us.
    let place = 8 << 30;
    let theirs: Vec<_> = (0..tiny_vm::GUARD_SLOTS.len() as u64)
        .map(|index| {
            let at = GuestAddress(place + index * 4096);
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(at, 4096)]).unwrap();
            memory.write_obj(0xcafe_u64, at).unwrap();
            let slot = tiny_vm::GUARD_SLOTS.start + index as u32;
            GuestRam::map(Arc::clone(&vm.vm), memory, slot..slot + 1).unwrap()
        })
        .collect();
    machine.stop().unwrap();
    let error = backend(&machine.add(4096).unwrap_err());
    assert!(error.contains("memslot 4") && error.contains("in use"), "{error}");
    // They are as they were: each can be removed once, without complaint.
    for ram in theirs {
        ram.unmap().unwrap();
    }
    machine.add(4096).unwrap();
    let regions = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(place), 4096),
        (GuestAddress(2 * place), 4096),
    ]);
    let error = GuestRam::map(Arc::clone(&vm.vm), regions.unwrap(), 9..10).err().unwrap();
    assert!(matches!(error, Error::TooFewSlots { regions: 2, slots: 1 }));
}

fn triple_fault_is_the_guards_first() {
    let (vm, mut machine) = TinyVm::start(&[at::spin(), at::triple()]);
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(1), StopReason::TripleFault));
    machine.registers(Vcpu(1)).unwrap();
    assert!(vm.host.yours.lock().unwrap().is_empty());
    machine.resume().unwrap();
    // Let go, it is the VMM's.
    vm.until("the VMM is told", |host| !host.yours.lock().unwrap().is_empty());
    assert_eq!(vm.host.yours.lock().unwrap()[0], (1, "Shutdown".to_owned()));
}

fn what_kvm_cannot_run() {
    if !matches!(HostKind::detect(), HostKind::Emulating { .. }) {
        // On the processor everything in this file can be run.
        return;
    }
    let (vm, mut machine) = TinyVm::start(&[at::popcount(), at::spin()]);
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::Unrunnable));
    assert_eq!(get(&mut machine, 0, Reg::Rip), at::popcount().0);
    // Given another place to go on at, it goes on.
    machine.set_registers(Vcpu(0), &call_registers_to(at::talk())).unwrap();
    machine.resume().unwrap();
    vm.until("it goes on", |host| host.talks.load(Ordering::Relaxed) > 0);
    assert!(vm.host.yours.lock().unwrap().is_empty());
}

fn panic_is_told_by_the_vmm() {
    let (_vm, mut machine) = TinyVm::start(&[at::spin(), at::panicking()]);
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(1), StopReason::Panicked));
    let before = get(&mut machine, 0, Reg::Rbx);
    run_till(&mut machine, "it runs on", |machine| get(machine, 0, Reg::Rbx) > before);
}

fn reset_voids_hooks_and_fresh_memory() {
    let (vm, mut machine) = armed(&[at::hooking(), at::spin()], &[panic_hook()]);
    wait(&mut machine);
    machine.add(4096).unwrap();
    let ranges = machine.phys().ranges().len();
    machine.reporter().reset();
    assert_eq!(wait(&mut machine).reason, StopReason::Reset);
    assert_eq!(machine.phys().ranges().len(), ranges - 1);
    machine.resume().unwrap();
    assert_eq!(machine.wait(Duration::from_millis(20)).unwrap(), None, "no hooks any more");
    assert!(vm.host.errors.lock().unwrap().is_empty());
}

fn an_ended_vm_lets_everybody_go() {
    let (mut vm, mut machine) = armed(&[at::hooking(), at::spin()], &[panic_hook()]);
    wait(&mut machine);
    // Both stand for the guard; the VMM wants to leave.
    vm.end();
    assert_eq!(wait(&mut machine).reason, StopReason::Gone);
    assert!(matches!(machine.stop(), Err(MachineError::Gone)));
    assert!(matches!(machine.registers(Vcpu(0)), Err(MachineError::Gone)));
    machine.detach().unwrap();
}

fn dropping_lets_the_guest_run() {
    // Standing at a hook, standing, running.
    for case in 0..3 {
        let (vm, mut machine) = armed(&[at::hooking(), at::talk()], &[panic_hook()]);
        match case {
            0 => drop(wait(&mut machine)),
            1 => machine.stop().unwrap(),
            _ => {}
        }
        let begun = vm.host.talks.load(Ordering::Relaxed);
        if case == 0 {
            machine.detach().unwrap()
        } else {
            drop(machine)
        }
        vm.until("the guest runs", |host| host.talks.load(Ordering::Relaxed) > begun + 100);
        assert!(vm.host.errors.lock().unwrap().is_empty());
        assert!(vm.host.yours.lock().unwrap().is_empty());
    }
}

fn real_mode_at_a_hook() {
    let begins = [Begin::Real, Begin::Long(at::spin())];
    let (mut vm, machine) = TinyVm::new(&begins, Options::default());
    let mut machine = machine.unwrap();
    vm.run();
    machine.stop().unwrap();
    let place = hook(HookKind::Panic, GuestVirt(tiny_vm::REAL_CODE));
    machine.arm(&[place]).unwrap();
    machine.resume().unwrap();
    for _ in 0..3 {
        let stop = wait(&mut machine);
        assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::Hook(place)));
        let regs = machine.registers(Vcpu(0)).unwrap();
        assert_eq!(regs.get(Reg::Cr0).map(|cr0| cr0 & 0x8000_0001), Some(0), "no PE, no PG");
        machine.resume().unwrap();
    }
}

/// Whether vCPU 0 is done with its writes.
fn has_written(machine: &mut Kvm) -> bool {
    get(machine, 0, Reg::Rip) < at::sleep().0
}

fn dirty_log() {
    let begins = [Begin::Long(at::dirtying()), Begin::Long(at::sleep())];
    let (mut vm, machine) = TinyVm::new(&begins, Options::default());
    let mut machine = machine.unwrap();
    vm.ram.log_dirty(true).unwrap();
    let slot = vm.ram.slots()[0].clone();
    vm.run();
    machine.stop().unwrap();
    run_till(&mut machine, "it has written", has_written);
    let pages = DirtyPages::take(&vm.vm, &slot).unwrap();
    let expected: Vec<GuestPhys> = (0..16).map(|i| GuestPhys(0x20_0000 + i * 0x2000)).collect();
    let written: Vec<GuestPhys> = pages.iter().filter(|page| page.0 >= 0x20_0000).collect();
    assert_eq!(written, expected);
    assert!(DirtyPages::take(&vm.vm, &slot).unwrap().iter().all(|page| page.0 < 0x20_0000));
    vm.ram.log_dirty(false).unwrap();
    assert!(DirtyPages::take(&vm.vm, &slot).is_err());
}

fn dirty_ring() {
    let begins = [Begin::Long(at::dirtying()), Begin::Long(at::sleep())];
    let options = Options { ring: Some(1024), ..Options::default() };
    let (mut vm, machine) = TinyVm::new(&begins, options);
    let mut machine = machine.unwrap();
    vm.ram.log_dirty(true).unwrap();
    let slots = vm.ram.slots();
    vm.run();
    machine.stop().unwrap();
    run_till(&mut machine, "it has written", has_written);
    let mut written = vm.rings[0].collect(&slots);
    written.retain(|page| page.0 >= 0x20_0000);
    written.sort();
    let expected: Vec<GuestPhys> = (0..16).map(|i| GuestPhys(0x20_0000 + i * 0x2000)).collect();
    assert_eq!(written, expected);
    assert!(dirty::reset(&vm.vm).unwrap() >= 16);
    assert!(vm.rings[0].collect(&slots).is_empty());
    // Noted anew.
    machine.set_registers(Vcpu(0), &call_registers_to(at::dirtying())).unwrap();
    run_till(&mut machine, "it has written again", has_written);
    let again = vm.rings[0].collect(&slots);
    assert_eq!(again.iter().filter(|page| page.0 >= 0x20_0000).count(), 16);
}

fn the_guests_own_debug_exceptions() {
    // A guest that steps itself, without an IDT to deliver #DB to: given back, it is a triple fault; kept, the guest
    // would run on as if nothing had been.
    let (_vm, mut machine) = armed(&[at::spin(), at::sleep()], &[panic_hook()]);
    machine.stop().unwrap();
    let flags = get(&mut machine, 0, Reg::Rflags);
    let stepping = Registers::unknown().with(Reg::Rflags, flags | guest::RFLAGS_TF);
    machine.set_registers(Vcpu(0), &stepping).unwrap();
    machine.resume().unwrap();
    let stop = wait(&mut machine);
    assert_eq!((stop.vcpu, stop.reason), (Vcpu(0), StopReason::TripleFault));
}

fn a_moved_vcpu_does_not_meet_the_hook_again() {
    let (vm, mut machine) = armed(&[at::hooking(), at::hooking()], &[panic_hook()]);
    let first = wait(&mut machine);
    for vcpu in [0, 1] {
        machine.set_registers(Vcpu(vcpu), &call_registers_to(at::talk())).unwrap();
    }
    machine.resume().unwrap();
    assert_eq!(machine.wait(Duration::from_millis(20)).unwrap(), None, "after {first:?}");
    assert!(vm.host.talks.load(Ordering::Relaxed) > 0);
}
