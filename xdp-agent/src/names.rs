//! Names of hosts, where the C library is linked statically.

/// Has host names looked up in `/etc/hosts` and by DNS, whatever `/etc/nsswitch.conf` says.
///
/// A released agent has glibc inside. What else that file may name are libraries of the node, which glibc would load into
/// the process, with the node's own glibc as their dependency: one of another version than this.
pub fn look_up_by_files_and_dns() {
    #[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
    {
        unsafe extern "C" {
            /// nss.h; returns 0 for a known database and a line that can be read, as this is.
            fn __nss_configure_lookup(
                database: *const libc::c_char,
                line: *const libc::c_char,
            ) -> libc::c_int;
        }
        // SAFETY: both are strings that live as long as the program, and no other thread runs yet.
        unsafe { __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr()) };
    }
}
