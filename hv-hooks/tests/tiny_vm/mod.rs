//! A VM of two vCPUs for the tests and measures of the KVM backend: 64-bit code from below, a few I/O ports, threads
//! that do what a VMM's do.
#![allow(unsafe_code, reason = "labels of the guest's code are linker symbols")]
#![allow(dead_code, reason = "not every user needs all of it")]

use std::arch::global_asm;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use defib_hv_hooks::kvm::dirty::DirtyRing;
use defib_hv_hooks::kvm::{self, GuestRam, KvmMachine, Next, Parts, Reporter, VcpuEvent, VcpuPort};
use guest::{GuestPhys, GuestVirt};
use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2, kvm_mp_state, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::SIGRTMIN;

global_asm!(
    ".pushsection .rodata",
    ".global guest_code, guest_code_end, spin, sleep, talk, hooking, hooked, function, function_end",
    ".global crashing, four, h1, h2, h3, triple, popcount, panicking, blocking, dirtying, far_read",
    "guest_code:",
    // Counts in rbx, for ever.
    "spin: inc rbx; jmp spin",
    // Sleeps, for ever.
    "sleep: hlt; jmp sleep",
    // Leaves for the VMM all the time.
    "talk: out 0x10, al; inc rbx; jmp talk",
    // Calls a hooked function, for ever; counts calls in rbx and entries in rcx.
    "hooking: call hooked; inc rbx; jmp hooking",
    "hooked: inc rcx; nop; ret",
    // What a guard calls.
    "function: lea rax, [rdi + rsi]",
    "function_end: nop; jmp function_end",
    // A function that meets a hook.
    "crashing: call hooked; jmp function_end",
    // A function that meets the hook that gives way, and none else.
    "four: call h3; lea rax, [rdi + rsi]; jmp function_end",
    "h1: nop; ret",
    "h2: nop; ret",
    "h3: nop; ret",
    // A fault without a way to deliver it.
    "triple: lidt [rip + nothing]; ud2",
    // Not known to KVM's emulator.
    "popcount: popcnt rax, rax; jmp spin",
    "panicking: mov al, 1; out 0x30, al; jmp spin",
    // The VMM's handler does not come back for a while.
    "blocking: out 0x12, al; jmp spin",
    // Writes to 16 pages from 2 MiB on, one in two; then spins.
    "dirtying: mov rdi, 0x200000; mov ecx, 16",
    "2: mov [rdi], rcx; add rdi, 0x2000; dec ecx; jnz 2b; jmp spin",
    // Reads from the address in rdi.
    "far_read: mov rax, [rdi]; jmp function_end",
    "nothing: .quad 0, 0",
    "guest_code_end:",
    ".popsection"
);

macro_rules! labels {
    ($($name:ident)*) => {
        unsafe extern "C" { $(safe static $name: u8;)* }
        /// Where a label of the guest's code is in the guest.
        pub mod at {
            use guest::GuestVirt;
            $(pub fn $name() -> GuestVirt {
                let offset = (&raw const super::$name).addr() - (&raw const super::guest_code).addr();
                GuestVirt(super::CODE + offset as u64)
            })*
        }
    };
}
labels! {
    guest_code guest_code_end spin sleep talk hooking hooked function function_end crashing four h1 h2 h3 triple
    popcount panicking blocking dirtying far_read
}

pub const CODE: u64 = 0x10_0000;
pub const MEMORY: usize = 4 << 20;
pub const LIMIT: Duration = Duration::from_secs(20);
pub const RAM_SLOTS: std::ops::Range<u32> = 0..4;
pub const GUARD_SLOTS: std::ops::Range<u32> = 4..8;
/// In real mode, 16-bit code here: `1: nop; inc ax; jmp 1b`.
pub const REAL_CODE: u64 = 0x8000;

/// What the vCPU threads share with a test.
#[derive(Default)]
pub struct Host {
    pub ending: AtomicBool,
    /// I/O exits.
    pub talks: AtomicU64,
    /// While set, I/O to port 0x12 does not come back.
    pub block: AtomicBool,
    /// A vCPU is there.
    pub blocked: AtomicBool,
    /// The thread of vCPU 1 is to end, as one that panicked.
    pub vanish: AtomicBool,
    /// Events that were left to the VMM, but for interrupts.
    pub yours: Mutex<Vec<(usize, String)>>,
    /// Errors of `take`.
    pub errors: Mutex<Vec<String>>,
    /// `KVM_RUN`s that came back.
    pub exits: AtomicU64,
    pub reporter: Mutex<Option<Reporter>>,
}

/// How a vCPU begins.
#[derive(Clone, Copy)]
pub enum Begin {
    /// In 64-bit mode, here.
    Long(GuestVirt),
    /// In real mode, at [`REAL_CODE`].
    Real,
}

pub struct TinyVm {
    pub host: Arc<Host>,
    pub vm: Arc<VmFd>,
    pub ram: GuestRam<GuestMemoryMmap>,
    pub rings: Vec<DirtyRing>,
    vcpus: Vec<VcpuFd>,
    ports: Vec<VcpuPort>,
    threads: Vec<JoinHandle<()>>,
}

pub struct Options {
    pub guarded: bool,
    pub ring: Option<u32>,
    pub reserved: Vec<std::ops::Range<GuestPhys>>,
    pub address_bits: Option<u8>,
}

impl Default for Options {
    fn default() -> Self {
        Self { guarded: true, ring: None, reserved: Vec::new(), address_bits: None }
    }
}

impl TinyVm {
    pub fn new(begins: &[Begin], options: Options) -> (Self, Option<KvmMachine<GuestMemoryMmap>>) {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        if let Some(entries) = options.ring {
            DirtyRing::enable(&vm, entries).unwrap();
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        fill(&memory);
        let ram = GuestRam::map(Arc::clone(&vm), memory, RAM_SLOTS).unwrap();
        let vcpus: Vec<VcpuFd> =
            (0..).zip(begins).map(|(id, begin)| create_vcpu(&vm, id, *begin, &options)).collect();
        let rings = options.ring.map_or_else(Vec::new, |entries| {
            vcpus.iter().map(|vcpu| DirtyRing::of(vcpu, entries).unwrap()).collect()
        });
        let host = Arc::new(Host::default());
        let (mut machine, mut ports) = (None, Vec::new());
        if options.guarded {
            let attached = kvm::attach(Parts {
                vm: Arc::clone(&vm),
                memory: ram.memory().clone(),
                vcpus: &vcpus,
                signal: SIGRTMIN(),
                slots: GUARD_SLOTS,
                reserved: options.reserved,
            });
            let (attached, its_ports) = attached.unwrap();
            *host.reporter.lock().unwrap() = Some(attached.reporter());
            (machine, ports) = (Some(attached), its_ports);
        }
        (Self { host, vm, ram, rings, vcpus, ports, threads: Vec::new() }, machine)
    }

    /// A VM that runs, and its machine.
    pub fn start(begins: &[GuestVirt]) -> (Self, KvmMachine<GuestMemoryMmap>) {
        let begins: Vec<Begin> = begins.iter().map(|at| Begin::Long(*at)).collect();
        let (mut vm, machine) = Self::new(&begins, Options::default());
        vm.run();
        (vm, machine.unwrap())
    }

    /// Starts the vCPU threads.
    pub fn run(&mut self) {
        let mut ports = std::mem::take(&mut self.ports).into_iter();
        for (index, vcpu) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let (host, port) = (Arc::clone(&self.host), ports.next());
            let thread = std::thread::spawn(move || vcpu_loop(index, vcpu, port, &host));
            self.threads.push(thread);
        }
    }

    /// Waits until something holds.
    pub fn until(&self, what: &str, holds: impl Fn(&Host) -> bool) {
        let start = Instant::now();
        while !holds(&self.host) {
            assert!(start.elapsed() < LIMIT, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the VM: all threads come back, whatever the guard did.
    pub fn end(&mut self) {
        self.host.ending.store(true, Ordering::Release);
        self.host.block.store(false, Ordering::Release);
        if let Some(reporter) = self.host.reporter.lock().unwrap().as_ref() {
            reporter.ended();
        }
        let start = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            if start.elapsed() > LIMIT {
                eprintln!("a vCPU thread does not come back");
                std::process::abort();
            }
            for thread in &self.threads {
                use vmm_sys_util::signal::Killable;
                if !thread.is_finished() {
                    let _ = thread.kill(SIGRTMIN());
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in self.threads.drain(..) {
            thread.join().expect("a vCPU thread did not panic");
        }
    }
}

impl Drop for TinyVm {
    fn drop(&mut self) {
        self.end();
    }
}

/// Page tables that map the first GiB and the fifth as they are; the code.
fn fill(memory: &GuestMemoryMmap) {
    let entry = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    entry(0x1000, 0x2003);
    for (gib, table) in [(0, 0x3000), (4, 0x4000)] {
        entry(0x2000 + gib * 8, table | 3);
        for index in 0..512 {
            entry(table + index * 8, ((gib << 30) + (index << 21)) | 0x83);
        }
    }
    let len = (&raw const guest_code_end).addr() - (&raw const guest_code).addr();
    // SAFETY: the symbols are the ends of one run of bytes in a read-only section.
    let code = unsafe { std::slice::from_raw_parts(&raw const guest_code, len) };
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    memory.write_slice(&[0x90, 0x40, 0xeb, 0xfc], GuestAddress(REAL_CODE)).unwrap();
}

fn create_vcpu(vm: &VmFd, id: u64, begin: Begin, options: &Options) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).unwrap();
    let mut cpuid = Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    if let Some(bits) = options.address_bits {
        let leaf = |leaf: &mut kvm_cpuid_entry2| leaf.eax = leaf.eax & !0xff | u32::from(bits);
        cpuid.as_mut_slice().iter_mut().filter(|l| l.function == 0x8000_0008).for_each(leaf);
    }
    set_cpuid(&vcpu, &cpuid);
    let mut sregs = vcpu.get_sregs().unwrap();
    let mut regs = kvm_regs { rsp: 0x8_0000 + id * 0x1_0000, rflags: 2, ..Default::default() };
    match begin {
        Begin::Real => {
            (sregs.cs.base, sregs.cs.selector, regs.rip) = (0, 0, REAL_CODE);
        }
        Begin::Long(at) => {
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, 0x1000, 0x620, 0xd01);
            let flat =
                kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
            sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
            let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            regs.rip = at.0;
        }
    }
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&regs).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    vcpu
}

fn set_cpuid(vcpu: &VcpuFd, cpuid: &CpuId) {
    vcpu.set_cpuid2(cpuid).unwrap();
}

fn vcpu_loop(index: usize, mut vcpu: VcpuFd, mut port: Option<VcpuPort>, host: &Host) {
    if let Some(port) = &mut port {
        port.enter();
    }
    while !host.ending.load(Ordering::Acquire) {
        if index == 1 && host.vanish.load(Ordering::Acquire) {
            return;
        }
        let outcome = vcpu.run();
        host.exits.fetch_add(1, Ordering::Relaxed);
        if let Some(event) = VcpuEvent::of(&outcome) {
            let next = match &mut port {
                Some(port) => port.take(&mut vcpu, event),
                None => Ok(Next::Yours),
            };
            match (next, event) {
                (Ok(Next::Run), _) | (Ok(Next::Yours), VcpuEvent::Interrupted) => {}
                (Ok(Next::Yours), event) => {
                    host.yours.lock().unwrap().push((index, format!("{event:?}")));
                    return;
                }
                (Err(error), _) => {
                    host.errors.lock().unwrap().push(error.to_string());
                    return;
                }
            }
            continue;
        }
        match outcome {
            Ok(VcpuExit::IoOut(0x10, _)) => {
                host.talks.fetch_add(1, Ordering::Relaxed);
            }
            Ok(VcpuExit::IoOut(0x12, _)) => {
                host.blocked.store(true, Ordering::Release);
                while host.block.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(VcpuExit::IoOut(0x30, _)) => {
                let reporter = host.reporter.lock().unwrap().clone();
                reporter.into_iter().for_each(|reporter| reporter.panicked());
            }
            other => {
                host.errors.lock().unwrap().push(format!("{other:?}"));
                return;
            }
        }
    }
}
