//! Measures what each step of a repair costs on a running VM: `latency QMP [HOOK EMPTY]`, where HOOK is a
//! kernel function that the guest calls now and then and EMPTY one that returns at once (link addresses of a
//! guest booted with nokaslr). The VM is left as it was.

use std::time::{Duration, Instant};

use defib_hv_hooks::qemu::{AttachOptions, Qemu};
use guest::{
    AddressSpace, Call, Control, FreshKind, FreshMemory, GuestVirt, Hook, HookKind, Hooks, Machine,
    RFLAGS_IF, Reg, StopReason, Vcpu, VirtMemory, WriteMemory,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Prints minimum, median and maximum.
fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    if let (Some(first), Some(last), Some(middle)) =
        (times.first(), times.last(), times.get(times.len() / 2))
    {
        println!(
            "{what:<44} n={:<4} min {first:>9.1?} p50 {middle:>9.1?} max {last:>9.1?}",
            times.len()
        );
    }
}

/// Times `rounds` runs of a step.
fn time<T>(rounds: usize, mut step: impl FnMut() -> Outcome<T>) -> Outcome<Vec<Duration>> {
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            step()?;
            Ok(start.elapsed())
        })
        .collect()
}

fn plain_steps(vm: &mut Qemu) -> Outcome<()> {
    let (mut stop, mut go, mut read, mut again, mut set) = (vec![], vec![], vec![], vec![], vec![]);
    for round in 0..100u64 {
        stop.extend(time(1, || Ok(vm.stop()?))?);
        read.extend(time(1, || Ok(vm.registers(Vcpu(0))?))?);
        again.extend(time(1, || Ok(vm.registers(Vcpu(0))?))?);
        let before = vm.registers(Vcpu(1))?;
        let regs = before.with(Reg::Rax, round).with(Reg::Rdi, round + 1).with(Reg::Rsi, round + 2);
        set.extend(time(1, || Ok(vm.set_registers(Vcpu(1), &regs)?))?);
        vm.set_registers(Vcpu(1), &before)?;
        go.extend(time(1, || Ok(vm.resume()?))?);
        std::thread::sleep(Duration::from_millis(5));
    }
    report("stop", stop);
    report("registers (first time)", read);
    report("registers (known)", again);
    report("set 3 registers", set);
    report("resume", go);
    report("descriptor tables (running)", time(20, || Ok(vm.cpu_tables(Vcpu(0))?))?);
    Ok(())
}

fn fresh_steps(vm: &mut Qemu) -> Outcome<()> {
    vm.stop()?;
    let (mut add, mut remove, mut code) = (vec![], vec![], vec![]);
    let mut kind = FreshKind::HotAdded;
    for round in 0..50u8 {
        let mut region = None;
        add.extend(time(1, || {
            region = Some(vm.add(64 << 10)?);
            Ok(())
        })?);
        let region = region.ok_or("no region")?;
        kind = region.kind;
        let mut bytes = vec![0xff; 4096];
        vm.phys().read(region.at, &mut bytes)?;
        assert!(bytes.iter().all(|&byte| byte == 0), "fresh memory is zeroed");
        code.extend(time(1, || Ok(vm.write_code(region.at, &[round; 4096])?))?);
        vm.phys().read(region.at, &mut bytes)?;
        assert!(bytes.iter().all(|&byte| byte == round), "code was written");
        remove.extend(time(1, || Ok(vm.remove(region)?))?);
        // The guest runs in between, as it would.
        vm.resume()?;
        std::thread::sleep(Duration::from_millis(5));
        vm.stop()?;
    }
    report(&format!("fresh memory: add ({kind:?})"), add);
    report("fresh memory: write 4 KiB of code", code);
    report("fresh memory: remove", remove);
    vm.resume()?;
    Ok(())
}

fn hook_steps(vm: &mut Qemu, hook: GuestVirt, empty: GuestVirt) -> Outcome<()> {
    vm.stop()?;
    report(
        "arm one hook",
        time(1, || Ok(vm.arm(&[Hook { kind: HookKind::OopsBegin, at: hook }])?))?,
    );
    vm.resume()?;
    let (mut pass, mut call, mut read) = (vec![], vec![], vec![]);
    for _ in 0..100 {
        let stop = vm.wait(Duration::from_secs(20))?.ok_or("the hook was not reached")?;
        let StopReason::Hook(reached) = stop.reason else { return Err(format!("{stop:?}").into()) };
        assert_eq!(reached.at, hook);
        let mut before = None;
        read.extend(time(1, || {
            before = Some(vm.registers(stop.vcpu)?);
            Ok(())
        })?);
        let before = before.ok_or("no registers")?;
        let stack =
            before.rsp().ok_or("no rsp")?.wrapping_add(0u64.wrapping_sub(256)).align_down(16);
        let stack = stack.wrapping_add(0u64.wrapping_sub(8));
        let end = GuestVirt(hook.0 + 1);
        let space = AddressSpace::of_vcpu(vm.phys(), &before).ok_or("no page tables")?;
        let at = space.translate(stack)?;
        let below = vm.phys().read_u64(at)?;
        vm.write(at, &end.0.to_le_bytes())?;
        let flags = before.get(Reg::Rflags).ok_or("no flags")? & !RFLAGS_IF;
        let regs = before.with(Reg::Rip, empty.0).with(Reg::Rsp, stack.0).with(Reg::Rflags, flags);
        call.extend(time(1, || {
            Ok(vm.run_until(stop.vcpu, &regs, end, Duration::from_secs(5))?)
        })?);
        vm.write(at, &below.to_le_bytes())?;
        vm.set_registers(stop.vcpu, &before)?;
        pass.extend(time(1, || Ok(vm.resume()?))?);
    }
    vm.stop()?;
    vm.disarm()?;
    vm.resume()?;
    report("registers after a hook (known)", read);
    report("run_until of an empty function", call);
    report("resume past the hook (one step)", pass);
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let qmp = arguments.first().ok_or("latency QMP [HOOK EMPTY]")?;
    let start = Instant::now();
    let mut vm = Qemu::attach(AttachOptions::new(qmp))?;
    println!(
        "attached to QEMU {:?} in {:.1?} (paused {:.1?}), {} vCPUs, RAM {:x?}, mapped: {}, recovered: {}",
        vm.version(),
        start.elapsed(),
        vm.attach_pause(),
        vm.vcpu_count(),
        vm.phys().ranges(),
        vm.memory_is_mapped(),
        vm.recovered()
    );
    plain_steps(&mut vm)?;
    fresh_steps(&mut vm)?;
    let address = |index: usize| {
        let text = arguments.get(index).map(|text| text.trim_start_matches("0x"));
        text.map(|text| u64::from_str_radix(text, 16).map(GuestVirt)).transpose()
    };
    if let (Some(hook), Some(empty)) = (address(1)?, address(2)?) {
        hook_steps(&mut vm, hook, empty)?;
    }
    let start = Instant::now();
    vm.detach()?;
    println!("detached in {:.1?}", start.elapsed());
    Ok(())
}
