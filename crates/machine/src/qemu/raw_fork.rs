//! Forking QEMU by the least that it takes: the baseline that our own forks are measured against.
//!
//! One bare machine boots with its memory in a file, prints its line and waits for another on its serial line; it is stopped,
//! its devices' state is saved, and it is ended. Each fork maps the file privately, loads the state, goes on, and answers a line
//! with its own. No disk, no network, no fences, no cgroup, nothing noted anywhere. Blocks.

use super::baseline::{LINE, bare, bare_archive, bare_words};
use super::qmp::STATE_NAME;
use crate::VmmError;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vistara_host::files;
use vistara_model::{Accelerator, Bytes};

/// Longest that a boot, and everything else here, may take.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(30);

fn failed(step: &'static str) -> impl Fn(String) -> VmmError {
    move |message| VmmError::Launch { step, message }
}

/// A bare machine that can be forked.
#[derive(Debug)]
pub struct RawTemplate {
    qemu: PathBuf,
    accelerator: Accelerator,
    memory: Bytes,
    scratch: PathBuf,
    file: File,
    state: File,
    forks: AtomicU32,
}

/// A fork that has answered; it is ended when this is dropped.
#[derive(Debug)]
pub struct RawFork {
    child: Child,
    /// From the start of its monitor to its answer.
    pub took: Duration,
}

impl RawFork {
    /// Its monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for RawFork {
    fn drop(&mut self) {
        // Both can only fail where it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A monitor with its serial line and its machine protocol.
struct Raw {
    process: RawFork,
    serial: ChildStdin,
    lines: mpsc::Receiver<()>,
    control: Option<BufReader<UnixStream>>,
    socket: PathBuf,
}

impl Raw {
    fn start(mut command: Command, socket: PathBuf) -> Result<Raw, VmmError> {
        let error = failed("starting QEMU");
        // A socket of an earlier one; mostly there is none.
        let _ = std::fs::remove_file(&socket);
        let option = format!("unix:{},server=on,wait=off", socket.display());
        let mut child = command
            .args(["-qmp", &option])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|why| error(why.to_string()))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let process = RawFork {
            child,
            took: Duration::ZERO,
        };
        let (serial, mut out) = pipes.ok_or_else(|| error("it has no pipes".to_owned()))?;
        let (told, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let word = &LINE[..LINE.len() - 1];
            let mut text = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut piece) {
                text.extend_from_slice(&piece[..count]);
                while let Some(at) = text.windows(word.len()).position(|window| window == word) {
                    text.drain(..at + word.len());
                    if told.send(()).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Raw {
            process,
            serial,
            lines,
            control: None,
            socket,
        })
    }

    /// Connects to the machine protocol as soon as that is there.
    fn connect(&mut self) -> Result<(), VmmError> {
        let error = failed("speaking to QEMU");
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(why) if Instant::now() > deadline => return Err(error(why.to_string())),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        let limited = stream.set_read_timeout(Some(LIMIT));
        limited.map_err(|why| error(why.to_string()))?;
        self.control = Some(BufReader::new(stream));
        self.next()?;
        self.ask("qmp_capabilities", Value::Null, None)?;
        let on = |capability: &str| json!({"capability": capability, "state": true});
        let capabilities = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
        self.ask("migrate-set-capabilities", capabilities, None)
    }

    fn next(&mut self) -> Result<Value, VmmError> {
        let error = failed("speaking to QEMU");
        let mut line = String::new();
        let control = self.control.as_mut();
        let control = control.ok_or_else(|| error("it is not connected".to_owned()))?;
        match control.read_line(&mut line) {
            Ok(0) => Err(error("it has ended".to_owned())),
            Ok(_) => serde_json::from_str(&line).map_err(|why| error(why.to_string())),
            Err(why) => Err(error(why.to_string())),
        }
    }

    fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        file: Option<&File>,
    ) -> Result<(), VmmError> {
        let error = failed("speaking to QEMU");
        let mut request = json!({"execute": command});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let line = format!("{request}\n");
        let control = self.control.as_mut();
        let control = control.ok_or_else(|| error("it is not connected".to_owned()))?;
        let stream = control.get_mut();
        let sent = match file {
            Some(file) => {
                let descriptors = [file.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                let parts = [IoSlice::new(line.as_bytes())];
                // Some hundred bytes on an empty socket go at once.
                sendmsg(stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)
                    .map(drop)
                    .map_err(std::io::Error::from)
            }
            None => stream.write_all(line.as_bytes()),
        };
        sent.map_err(|why| error(why.to_string()))?;
        loop {
            let answer = self.next()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(refused) = answer.get("error") {
                return Err(error(format!("{command}: {refused}")));
            }
        }
    }

    /// Saves or loads the devices' state.
    fn transfer(&mut self, command: &str, file: &File) -> Result<(), VmmError> {
        self.ask("getfd", json!({"fdname": STATE_NAME}), Some(file))?;
        self.ask(command, json!({"uri": format!("fd:{STATE_NAME}")}), None)?;
        loop {
            let event = self.next()?;
            if event["event"] == "MIGRATION" {
                match event["data"]["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed") => {
                        return Err(failed("transferring the state")(event.to_string()));
                    }
                    _ => {}
                }
            }
        }
    }

    fn hear(&self, limit: Duration) -> Result<(), VmmError> {
        self.lines.recv_timeout(limit).map_err(|_| {
            failed("waiting for the bare guest")("it does not print its line".to_owned())
        })
    }
}

impl RawTemplate {
    /// Boots a bare machine and captures it. `scratch` is a directory of the caller's own, whose path is short.
    ///
    /// # Errors
    /// [`VmmError::Launch`].
    pub fn make(
        qemu: &Path,
        kernel: &Path,
        accelerator: Accelerator,
        memory: Bytes,
        scratch: &Path,
    ) -> Result<RawTemplate, VmmError> {
        let error = failed("making the raw template");
        let io = |why: std::io::Error| error(why.to_string());
        let initramfs = bare_archive(scratch).map_err(io)?;
        let file = files::sealable_memory_file(Bytes::mib(memory.to_mib_ceil()).0).map_err(io)?;
        let template = RawTemplate {
            qemu: qemu.to_owned(),
            accelerator,
            memory,
            scratch: scratch.to_owned(),
            file,
            state: files::sealable_memory_file(0).map_err(io)?,
            forks: AtomicU32::new(0),
        };
        let mut command = template.command("on");
        command.args(["-append", &bare_words(accelerator)]);
        command.arg("-kernel").arg(kernel);
        command.arg("-initrd").arg(&initramfs);
        let mut raw = Raw::start(command, template.socket())?;
        raw.hear(BOOT_LIMIT)?;
        raw.connect()?;
        raw.ask("stop", Value::Null, None)?;
        raw.transfer("migrate", &template.state)?;
        drop(raw);
        files::seal_for_good(&template.file).map_err(io)?;
        Ok(template)
    }

    fn socket(&self) -> PathBuf {
        let number = self.forks.fetch_add(1, Ordering::Relaxed);
        self.scratch.join(format!("raw-{number}.sock"))
    }

    fn command(&self, share: &str) -> Command {
        let machine = "microvm,acpi=on,memory-backend=memory";
        let mut command = bare(&self.qemu, machine, self.accelerator, self.memory);
        // By our own number: the file is the same whoever opens it.
        let object = format!(
            "memory-backend-file,id=memory,size={}M,mem-path=/proc/{}/fd/{},share={share}",
            self.memory.to_mib_ceil(),
            std::process::id(),
            self.file.as_raw_fd()
        );
        command.args(["-object", &object]);
        command
    }

    /// Starts a fork and waits until it has answered a line. Any number may be started at once.
    ///
    /// # Errors
    /// [`VmmError::Launch`].
    pub fn fork(&self) -> Result<RawFork, VmmError> {
        let error = failed("forking the raw template");
        let state = files::reopen_to_read(&self.state).map_err(|why| error(why.to_string()))?;
        let mut command = self.command("off");
        command.args(["-S", "-incoming", "defer"]);
        let socket = self.socket();
        let begin = Instant::now();
        let mut raw = Raw::start(command, socket)?;
        raw.connect()?;
        raw.transfer("migrate-incoming", &state)?;
        raw.ask("cont", Value::Null, None)?;
        let asked = raw
            .serial
            .write_all(b"\n")
            .and_then(|()| raw.serial.flush());
        asked.map_err(|why| error(why.to_string()))?;
        raw.hear(LIMIT)?;
        let took = begin.elapsed();
        // The name is of no more use, and may be gone.
        let _ = std::fs::remove_file(&raw.socket);
        // Its serial line ends here: the guest waits on, as it would for another line.
        let Raw { mut process, .. } = raw;
        process.took = took;
        Ok(process)
    }
}
