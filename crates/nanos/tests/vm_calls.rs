//! Calls that the kernel is asked to tell of, under the real kernel. Needs what `vm_boot` needs, and the kernel's module `strace`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

#[allow(dead_code, reason = "other tests use the rest")]
mod machine;

use machine::{Boot, Lab};
use vistara_nanos::Manifest;
use vistara_nanos::calls::{self, Told};
use vistara_nanos::tfs::Value;

const CALLS: &[&str] = &[
    "fork",
    "vfork",
    "execve",
    "socket",
    "connect",
    "setuid",
    "exit_group",
];

const TRY: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>
static void *idle(void *p) { return p; }
int main(int argc, char **argv) {
  printf("begin "); fflush(stdout);
  struct sockaddr_un u = {.sun_family = AF_UNIX, .sun_path = "/var/run/nscd/socket"};
  int s = socket(AF_UNIX, SOCK_STREAM, 0);
  connect(s, (void *)&u, sizeof u);
  close(s);
  pthread_t t; pthread_create(&t, 0, idle, 0); pthread_join(t, 0);
  if (argc > 1) {
    syscall(SYS_fork); syscall(SYS_vfork); execl("/x", "x", NULL);
    if (fork() < 0) perror("fork");
    s = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(80)};
    a.sin_addr.s_addr = inet_addr("10.0.2.2");
    if (connect(s, (void *)&a, sizeof a)) perror("connect");
    setuid(3);
  }
  printf("end\n");
  return 7;
}
"#;

#[test]
fn what_a_program_tries_is_told_and_taken_out_of_what_it_prints() {
    let Some(lab) = Lab::find() else { return };
    let Some(module) = lab.klib(calls::MODULE) else {
        return;
    };
    let program = lab.compile(TRY);
    for (tries, wanted) in [
        (false, &["socket 3", "connect -ENOENT", "exit_group …"][..]),
        (
            true,
            &[
                "socket 3",
                "connect -ENOENT",
                "fork -ENOSYS",
                "vfork -ENOSYS",
                "execve -ENOSYS",
                "socket 3",
                "connect -113",
                "setuid 0",
                "exit_group …",
            ],
        ),
    ] {
        let mut arguments = vec![b"try".to_vec()];
        arguments.extend(tries.then(|| b"all".to_vec()));
        let mut manifest = Manifest {
            program: b"/bin/try".to_vec(),
            arguments,
            debug_exit: true,
            further: vec![(b"log_level".to_vec(), Value::text("warn"))],
            ..Manifest::default()
        };
        let files = calls::tell(&mut manifest, CALLS, lab.kernel_file(), module.clone());
        let mut boot = Boot::new(manifest).with_program("try", &program);
        boot.memory_mib = 128;
        boot.boot_files = vec![("kernel".into(), files.kernel)];
        for (name, content) in files.klibs {
            let path = format!("klib/{}", String::from_utf8(name).unwrap());
            boot.boot_files.push((path, content));
        }
        let end = lab.run(boot);
        assert_eq!(end.exit_code(), 7, "{}", end.console);
        let (mut told, mut left) = (Told::new(CALLS), Vec::new());
        let calls: Vec<String> = told
            .push(end.console.as_bytes(), &mut left)
            .into_iter()
            .map(|call| format!("{} {}", call.name, call.result.as_deref().unwrap_or("…")))
            .collect();
        told.finish(&mut left);
        assert_eq!(calls, wanted, "{}", end.console);
        let left = String::from_utf8(left).unwrap();
        let process = left.contains("clone: attempted to create new process");
        assert_eq!(process, tries, "{left}");
        assert!(left.contains("begin "), "{left}");
        assert!(left.contains("end\n"), "{left}");
    }
}
