//! What the agent tells the programs when it loads them.

use aya::EbpfLoader;

use crate::preflight::KernelVersion;

/// From this version on socket hooks may name the error that a call ends with (`bpf_set_retval`, kernel commit
/// dea6a4e17013).
const NAMES_ERRORS_SINCE: KernelVersion = KernelVersion(6, 0);

/// What programs have to know of the machine when they are loaded: the verifier then leaves out what is not for it. Without it they
/// do what works everywhere.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    names_errors: u32,
    reads_in_order: u32,
}

impl Constants {
    /// Those of this machine.
    ///
    /// # Errors
    /// When the kernel's version cannot be read.
    pub fn of_this_machine() -> anyhow::Result<Self> {
        let names_errors = KernelVersion::current()? >= NAMES_ERRORS_SINCE;
        // Memory ordering in Intel's SDM, volume 3A, and in AMD's manual, volume 2: no read overtakes another.
        let reads_in_order = cfg!(target_arch = "x86_64");
        Ok(Self { names_errors: names_errors.into(), reads_in_order: reads_in_order.into() })
    }

    /// Whether socket hooks name the error that a call ends with.
    pub fn names_errors(self) -> bool {
        self.names_errors != 0
    }

    /// Sets them for the product's object.
    pub fn set<'a, 'l>(&'a self, loader: &'l mut EbpfLoader<'a>) -> &'l mut EbpfLoader<'a> {
        loader.override_global("NAMES_ERRORS", &self.names_errors, true).override_global(
            "READS_IN_ORDER",
            &self.reads_in_order,
            true,
        )
    }
}
