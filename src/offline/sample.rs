//! What a console shows of one crash, for tests. No code.

/// An oops in a driver.
pub const OOPS: &str = "\
[   10.0] BUG: kernel NULL pointer dereference, address: 0000000000000000
[   10.0] #PF: supervisor write access in kernel mode
[   10.0] Oops: 0002 [#1] PREEMPT SMP NOPTI
[   10.0] CPU: 0 PID: 1 Comm: init Tainted: G           O       6.1.0-1-amd64 #1
[   10.0] RIP: 0010:toy_write+0x8/0x20 [toy]
[   10.0] Call Trace:
[   10.0]  <TASK>
[   10.0]  vfs_write+0xc7/0x3a0
[   10.0]  </TASK>
[   10.0] Modules linked in: toy(O)
[   10.0] ---[ end trace 0000000000000000 ]---
";
