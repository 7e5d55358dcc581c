//! Standing guard over one machine: what is known of its kernel, the way of one crash through the house,
//! probation afterwards. Knows no particular hypervisor and prints nothing.
#![forbid(unsafe_code)]
