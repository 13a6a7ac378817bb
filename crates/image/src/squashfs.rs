//! Sets the owner and time of the root directory in a finished squashfs.
//!
//! `sqfstar` 4.5 gives the root directory the time of packing and user 0 whatever its options say, so that the same layers
//! would never give the same disk twice. The inode table is written uncompressed (`-noI`, some tens of bytes a file), so that
//! the root's inode can be mended in place. Layout: the kernel's `fs/squashfs/squashfs_fs.h`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: u32 = 0x7371_7368;
/// Bytes that one metadata block holds.
const METADATA: u64 = 8192;
/// Set in a metadata block's length when it is not compressed.
const PLAIN: u16 = 1 << 15;

fn read<const N: usize>(file: &File, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn odd(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Sets owner, group and time of the root directory. An owner that nothing else in the disk has is left at 0.
pub(crate) fn set_root(file: &File, uid: u32, gid: u32, mtime: u32) -> io::Result<()> {
    if u32::from_le_bytes(read(file, 0)?) != MAGIC {
        return Err(odd("it is no squashfs"));
    }
    let ids = u16::from_le_bytes(read(file, 26)?);
    let root = u64::from_le_bytes(read(file, 32)?);
    let id_table = u64::from_le_bytes(read(file, 48)?);
    let inode_table = u64::from_le_bytes(read(file, 64)?);
    let block = inode_table + (root >> 16);
    let offset = root & 0xffff;
    if u16::from_le_bytes(read(file, block)?) & PLAIN == 0 {
        return Err(odd("its inodes are compressed"));
    }
    // An inode may run over into the next block, whose length stands between.
    let place = |index: u64| {
        let at = offset + index;
        block + 2 + at + if at >= METADATA { 2 } else { 0 }
    };
    let put = |from: u64, bytes: &[u8]| {
        (from..)
            .zip(bytes)
            .try_for_each(|(index, byte)| file.write_all_at(&[*byte], place(index)))
    };
    for (at, wanted) in [(4, uid), (6, gid)] {
        for id in 0..ids {
            let pointer = id_table + u64::from(id / 2048) * 8;
            let table = u64::from_le_bytes(read(file, pointer)?);
            let value = read(file, table + 2 + u64::from(id % 2048) * 4)?;
            if u32::from_le_bytes(value) == wanted {
                put(at, &id.to_le_bytes())?;
                break;
            }
        }
    }
    put(8, &mtime.to_le_bytes())
}
