//! Measures what each step of a guard costs on this host's KVM, with a guest of a few instructions on two vCPUs.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use defib_hv_hooks::kvm::{HostKind, KvmMachine};
use guest::{Call, Control, FreshMemory, Hook, HookKind, Hooks, Machine, Reg, Registers, Vcpu};
use vm_memory::GuestMemoryMmap;

#[path = "../tests/tiny_vm/mod.rs"]
mod tiny_vm;
use tiny_vm::{Begin, LIMIT, Options, TinyVm, at};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type Machined = KvmMachine<GuestMemoryMmap>;

const ROUNDS: usize = 500;

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

fn time<T>(into: &mut Vec<Duration>, step: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = step();
    into.push(start.elapsed());
    result
}

fn stops(name: &str, machine: &mut Machined) -> Outcome<()> {
    let (mut stop, mut resume, mut read) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        time(&mut stop, || machine.stop())?;
        time(&mut read, || machine.registers(Vcpu(0)))?;
        time(&mut resume, || machine.resume())?;
        std::thread::sleep(Duration::from_micros(500));
    }
    report(&format!("stop, 2 vCPUs that {name}"), stop);
    report("registers of one", read);
    report("resume", resume);
    Ok(())
}

fn hooks(machine: &mut Machined) -> Outcome<()> {
    machine.stop()?;
    machine.arm(&[Hook { kind: HookKind::Panic, at: at::hooked() }])?;
    machine.resume()?;
    let (mut met, mut again) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let stop = machine.wait(LIMIT)?.ok_or("no hook was met")?;
        met.push(stop.at.elapsed());
        let start = Instant::now();
        machine.resume()?;
        while machine.wait(LIMIT)?.is_none() {}
        again.push(start.elapsed());
        machine.resume()?;
    }
    report("hook met to report, all vCPUs standing", met);
    report("resume, pass the hook, meet it again", again);
    machine.stop()?;
    machine.disarm()?;
    Ok(())
}

/// Of a machine that stands.
fn repairs(machine: &mut Machined) -> Outcome<()> {
    let (mut add, mut remove, mut call) = (vec![], vec![], vec![]);
    let regs = Registers::unknown().with(Reg::Rip, at::function().0);
    for _ in 0..ROUNDS {
        let region = time(&mut add, || machine.add(64 << 10))?;
        time(&mut call, || machine.run_until(Vcpu(0), &regs, at::function_end(), LIMIT))?;
        time(&mut remove, || machine.remove(region))?;
    }
    report("memslot of 64 KiB in", add);
    report("memslot out", remove);
    report("call of an empty function", call);
    Ok(())
}

/// Exits a second of two vCPUs that do nothing else, and those that were not the guest's.
fn exits(guarded: bool) {
    let begins = [Begin::Long(at::talk()); 2];
    let (mut vm, machine) = TinyVm::new(&begins, Options { guarded, ..Options::default() });
    vm.run();
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let (exits, talks) = (vm.host.exits.load(Ordering::Relaxed), &vm.host.talks);
    let more = exits.saturating_sub(talks.load(Ordering::Relaxed));
    let rate = exits as f64 / start.elapsed().as_secs_f64();
    let name = if guarded { "with a guard" } else { "without a guard" };
    println!("exits a second {name:<29} {rate:>9.0}, {more} of them not the guest's own I/O");
    drop(machine);
}

fn main() -> Outcome<()> {
    let host = HostKind::detect();
    println!("{host}");
    if !host.is_usable() {
        return Ok(());
    }
    let kinds = [("sleep", at::sleep()), ("spin", at::spin()), ("exit all the time", at::talk())];
    for (name, begin) in kinds {
        let (_vm, mut machine) = TinyVm::start(&[begin, begin]);
        stops(name, &mut machine)?;
    }
    let (_vm, mut machine) = TinyVm::start(&[at::hooking(), at::spin()]);
    hooks(&mut machine)?;
    repairs(&mut machine)?;
    machine.detach()?;
    for guarded in [false, true, false, true] {
        exits(guarded);
    }
    Ok(())
}
