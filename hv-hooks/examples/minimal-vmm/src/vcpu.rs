//! A vCPU's thread: `KVM_RUN`, and what to do when it comes back. The guard is asked first.

use std::sync::Arc;

use hv_hooks::kvm::{Next, Reporter, VcpuEvent, VcpuPort};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::devices::{Devices, Request};
use crate::exit::{Ending, Exit};

/// What a vCPU's thread owns.
pub struct Vcpu {
    pub fd: VcpuFd,
    pub devices: Arc<Devices>,
    pub ending: Arc<Ending>,
    /// The guard's side of this vCPU and of the VM; `None` when nobody guards it.
    pub port: Option<VcpuPort>,
    pub reporter: Option<Reporter>,
}

impl Vcpu {
    /// Runs the vCPU until the VM ends.
    pub fn run(mut self) {
        if let Some(port) = &mut self.port {
            port.enter();
        }
        while !self.ending.is_over() {
            if let Some(exit) = self.turn() {
                self.end(exit);
            }
        }
    }

    /// One `KVM_RUN`. `Some` when the VM is to end.
    fn turn(&mut self) -> Option<Exit> {
        let outcome = self.fd.run();
        if let Some(event) = VcpuEvent::of(&outcome) {
            return self.take(event);
        }
        let request = match outcome {
            Ok(VcpuExit::IoOut(port, data)) => self.devices.io_out(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.devices.io_in(port, data);
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.devices.mmio_read(address, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.devices.mmio_write(address, data);
                None
            }
            // A vCPU that waits for its INIT was woken.
            Err(error) if error.errno() == libc::EAGAIN => None,
            Ok(exit) => Some(Request::End(Exit::Unrunnable(format!("{exit:?}")))),
            Err(error) => Some(Request::End(Exit::Unrunnable(format!("KVM_RUN: {error}")))),
        };
        match request? {
            Request::End(exit) => Some(exit),
            Request::Panicked => {
                if let Some(reporter) = &self.reporter {
                    reporter.panicked();
                }
                None
            }
        }
    }

    /// An event that a guard may have made or may care for; without one, or when it leaves the event to us,
    /// the VM takes its usual course.
    fn take(&mut self, event: VcpuEvent) -> Option<Exit> {
        if let Some(port) = &mut self.port {
            match port.take(&mut self.fd, event) {
                Ok(Next::Run) => return None,
                Ok(Next::Yours) => {}
                Err(error) => return Some(Exit::Unrunnable(error.to_string())),
            }
        }
        match event {
            VcpuEvent::Interrupted => None,
            VcpuEvent::Shutdown => Some(Exit::TripleFault),
            event => Some(Exit::Unrunnable(format!("{event:?}"))),
        }
    }

    fn end(&self, exit: Exit) {
        self.ending.end(exit);
        if let Some(reporter) = &self.reporter {
            reporter.ended();
        }
    }
}
