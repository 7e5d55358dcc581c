//! The VM as a whole: what is built in which order, the threads, and the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hv_hooks::kvm::{self, GuestRam, KvmMachine, Parts, Reporter, VcpuPort};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::console::{Console, SerialEnd};
use crate::devices::{self, Devices};
use crate::event_loop::EventLoop;
use crate::exit::{Ending, Exit};
use crate::memory::{self, Ram};
use crate::vcpu::Vcpu;
use crate::virtio_block::VirtioBlock;
use crate::virtio_mmio::VirtioMmio;
use crate::{Error, Result, acpi, boot, cpu};

/// How long vCPU threads may take to end, and how often they are told.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// What the VM is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Uncompressed vmlinux with a PVH entry point.
    pub kernel: PathBuf,
    /// initrd, given to the kernel as the first PVH module.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// A file that becomes a virtio block device.
    pub disk: Option<PathBuf>,
    /// The serial console's other end.
    pub serial: SerialEnd,
}

/// A VM.
pub struct Vmm {
    // Dropped from top to bottom: vCPUs before the RAM that they use.
    threads: Vec<JoinHandle<()>>,
    vcpus: Vec<VcpuFd>,
    ports: Vec<VcpuPort>,
    reporter: Option<Reporter>,
    event_loop: EventLoop,
    devices: Arc<Devices>,
    ending: Arc<Ending>,
    ram: GuestRam<Ram>,
    vm: Arc<VmFd>,
}

impl Vmm {
    /// Builds a VM whose first vCPU stands at the kernel's entry point.
    ///
    /// # Errors
    /// No KVM, not enough memory, a kernel that is none, a file that can't be read.
    pub fn new(config: &Config) -> Result<Self> {
        if !(1..=cpu::MAX_VCPUS).contains(&config.vcpus) {
            return Err(Error::VcpuCount(config.vcpus));
        }
        let kvm = Kvm::new().map_err(Error::NoKvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?);
        let ram = memory::allocate(config.memory_mib)?;
        let ram = GuestRam::map(Arc::clone(&vm), ram, memory::RAM_SLOTS)?;
        let entry =
            boot::load(ram.memory(), &config.kernel, config.initrd.as_deref(), &config.cmdline)?;
        acpi::write(ram.memory(), config.vcpus, config.disk.is_some())?;
        add_interrupt_controllers(&vm)?;
        let vcpus = create_vcpus(&kvm, &vm, config.vcpus, entry)?;
        let devices = Arc::new(create_devices(&vm, config, ram.memory())?);
        let ending = Arc::new(Ending::new()?);
        let event_loop = EventLoop::new(&ending, &devices, &config.serial)?;
        Ok(Self {
            threads: Vec::new(),
            vcpus,
            ports: Vec::new(),
            reporter: None,
            event_loop,
            devices,
            ending,
            ram,
            vm,
        })
    }

    /// Makes the VM a machine that a guard can watch. To be called before [`Vmm::start`].
    ///
    /// # Errors
    /// The vCPUs run already, or KVM lacks what hooks need.
    pub fn guard(&mut self) -> Result<KvmMachine<Ram>> {
        if self.vcpus.is_empty() {
            return Err(Error::Started);
        }
        let (machine, ports) = kvm::attach(Parts {
            vm: Arc::clone(&self.vm),
            memory: self.ram.memory().clone(),
            vcpus: &self.vcpus,
            signal: SIGRTMIN(),
            slots: memory::GUARD_SLOTS,
            reserved: memory::reserved(),
        })?;
        self.reporter = Some(machine.reporter());
        self.ports = ports;
        Ok(machine)
    }

    /// Starts the vCPUs, each in a thread of its own.
    ///
    /// # Errors
    /// They run already, or the host gives no thread.
    pub fn start(&mut self) -> Result<()> {
        if self.vcpus.is_empty() {
            return Err(Error::Started);
        }
        extern "C" fn only_interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), only_interrupt)
            .map_err(|error| Error::host("sigaction")(error.into()))?;
        let mut ports = std::mem::take(&mut self.ports).into_iter();
        for (index, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                devices: Arc::clone(&self.devices),
                ending: Arc::clone(&self.ending),
                port: ports.next(),
                reporter: self.reporter.clone(),
            };
            let thread = thread::Builder::new().name(format!("vcpu{index}"));
            let thread = thread.spawn(move || vcpu.run()).map_err(Error::host("vCPU thread"))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Serves the console until the VM ends, or for `limit`; `None` when the VM still runs then.
    ///
    /// # Errors
    /// The event loop failed.
    pub fn wait(&mut self, limit: Option<Duration>) -> Result<Option<Exit>> {
        self.event_loop.run(&self.ending, &self.devices, limit)
    }

    /// Says whether the VM has ended; may be asked from any thread.
    pub fn has_ended(&self) -> impl Fn() -> bool + Send + 'static {
        let ending = Arc::clone(&self.ending);
        move || ending.is_over()
    }

    /// What the guest has written to its console, the last MiB at most.
    #[must_use]
    pub fn serial_output(&self) -> Vec<u8> {
        self.devices.console.output()
    }

    /// Types on the guest's console; returns how many bytes were taken.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.devices.console.feed(bytes)
    }

    /// Ends the VM and its threads; returns why it ended.
    ///
    /// # Errors
    /// A vCPU does not leave its thread.
    pub fn stop(mut self) -> Result<Exit> {
        self.end()?;
        Ok(self.ending.exit().unwrap_or(Exit::Stopped))
    }

    fn end(&mut self) -> Result<()> {
        self.ending.end(Exit::Stopped);
        if let Some(reporter) = &self.reporter {
            reporter.ended();
        }
        let start = Instant::now();
        // A signal that comes just before KVM_RUN is lost, therefore more than one.
        while let Some(index) = self.threads.iter().position(|thread| !thread.is_finished()) {
            if start.elapsed() > LEAVE_LIMIT {
                return Err(Error::VcpuStuck(index));
            }
            // Fails only for a thread that has ended meanwhile.
            let _ = self.threads[index].kill(SIGRTMIN());
            thread::sleep(KICK_AGAIN);
        }
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Whoever wants to know of a stuck vCPU calls stop().
        let _ = self.end();
    }
}

fn add_interrupt_controllers(vm: &VmFd) -> Result<()> {
    vm.set_tss_address(memory::KVM_TSS).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: u32) -> Result<Vec<VcpuFd>> {
    let supported = cpu::supported_cpuid(kvm)?;
    let vcpus = (0..count).map(|id| {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        cpu::set_cpuid(&vcpu, &supported, id, count)?;
        if id == 0 {
            cpu::set_pvh_entry(&vcpu, entry)?;
        }
        Ok(vcpu)
    });
    vcpus.collect()
}

fn create_devices(vm: &VmFd, config: &Config, ram: &Ram) -> Result<Devices> {
    let line = |irq| {
        let line = EventFd::new(0).map_err(Error::host("eventfd"))?;
        vm.register_irqfd(&line, irq).map_err(Error::kvm("KVM_IRQFD"))?;
        Ok::<_, Error>(line)
    };
    let disk = config.disk.as_ref().map(|path| {
        let block = VirtioBlock::open(path)?;
        VirtioMmio::new(block, ram.clone(), line(devices::DISK_IRQ)?)
    });
    let console = Console::new(&config.serial, line(devices::SERIAL_IRQ)?)?;
    Ok(Devices { console, disk: disk.transpose()? })
}
