use super::*;
use crate::tfs::Node;
use std::io::Cursor;

fn options() -> DiskOptions {
    DiskOptions {
        id: VolumeId([9; 16]),
        label: Label::new("root").unwrap(),
        free_bytes: 0,
    }
}

fn manifest() -> Manifest {
    Manifest {
        program: b"/hello".to_vec(),
        debug_exit: true,
        ..Manifest::default()
    }
}

fn boot_disk() -> (Cursor<Vec<u8>>, Geometry) {
    let mut disk = BootDisk::create(Cursor::new(Vec::new()), &options(), &manifest()).unwrap();
    let root = disk.tree().root();
    disk.tree()
        .file(root, b"hello", 5, &mut &b"hello"[..])
        .unwrap();
    disk.finish().unwrap()
}

#[test]
fn a_boot_disk_has_its_parts_where_the_kernel_looks_for_them() {
    let (mut disk, geometry) = boot_disk();
    let table = PartitionTable::read(&mut disk).unwrap().unwrap();
    assert_eq!(table.klog_offset, 4096);
    assert_eq!((table.boot, table.root), (geometry.boot, geometry.root));
    assert_eq!(
        geometry.boot,
        Part {
            offset: 8192,
            length: 0
        }
    );
    assert_eq!(geometry.bytes, disk.get_ref().len() as u64);
    assert_eq!(&disk.get_ref()[8192..8198], b"NVMTFS");
    assert_eq!(disk.get_ref()[446], 0x80);
    assert_eq!(disk.get_ref()[450], 0x83);
    assert_eq!(disk.get_ref()[454..458], 16_u32.to_le_bytes());
    let reader = open(disk, &Limits::default()).unwrap();
    assert_eq!(reader.id(), VolumeId([9; 16]));
    let keys = Value::Tuple(reader.keys().unwrap());
    assert_eq!(keys.get(b"program"), Some(&Value::text("/hello")));
    assert!(matches!(reader.lookup(b"/hello"), Ok(Some(Node::File(_)))));
}

#[test]
fn a_boot_file_system_stands_before_the_root() {
    let fill = |boot: &mut Writer<Cursor<Vec<u8>>>| {
        let root = boot.root();
        boot.file(root, b"kernel", 6, &mut &b"kernel"[..])
            .map(|_| ())
    };
    let disk =
        BootDisk::with_boot_files(Cursor::new(Vec::new()), &options(), &manifest(), fill).unwrap();
    let (mut disk, geometry) = disk.finish().unwrap();
    assert!(geometry.boot.length > 0);
    assert_eq!(
        geometry.root.offset,
        geometry.boot.offset + geometry.boot.length
    );
    let boot = Reader::open(&mut disk, geometry.boot.offset, &Limits::default()).unwrap();
    assert!(matches!(boot.lookup(b"kernel"), Ok(Some(Node::File(_)))));
    let root = open(&mut disk, &Limits::default()).unwrap();
    assert_eq!(root.lookup(b"kernel").unwrap(), None);
}

#[test]
fn a_volume_has_no_partition_table_and_keeps_its_label() {
    let volume = Volume::create(Cursor::new(Vec::new()), &options()).unwrap();
    let (mut disk, written) = volume.finish().unwrap();
    assert!(written.bytes >= FREE_BYTES_MIN);
    assert_eq!(PartitionTable::read(&mut disk).unwrap(), None);
    let reader = open(disk, &Limits::default()).unwrap();
    assert_eq!(reader.label().as_bytes(), b"root");
    assert!(reader.keys().unwrap().is_empty());
}

#[test]
fn a_cleared_record_is_none() {
    let (mut disk, _) = boot_disk();
    let old = b"KLOG\x01\0\0\0\0\0\0\0\x07\0\0\0old";
    disk.get_mut()[4096..4096 + old.len()].copy_from_slice(old);
    assert_eq!(klog::read(&mut disk).unwrap().unwrap().exit_code, 7);
    klog::clear(&mut disk).unwrap();
    assert_eq!(klog::read(&mut disk).unwrap(), None);
    assert!(open(disk, &Limits::default()).is_ok());
}

#[test]
fn a_table_that_leaves_no_place_for_the_record_is_refused() {
    let (mut disk, _) = boot_disk();
    disk.get_mut()[454..458].copy_from_slice(&8_u32.to_le_bytes());
    let refused = PartitionTable::read(&mut disk);
    assert!(matches!(refused, Err(DiskError::NotBootDisk)));
}

#[test]
fn what_is_shorter_than_a_sector_is_no_disk() {
    let read = PartitionTable::read(&mut Cursor::new(vec![0; 100]));
    assert_eq!(read.unwrap(), None);
    assert!(open(Cursor::new(vec![0; 100]), &Limits::default()).is_err());
}
