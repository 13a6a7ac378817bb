//! Reads some files of an image out of its layers, in one pass.
//!
//! Layers are compressed streams: to read one file costs the unpacking of all that lies before it in its layer. So a caller
//! names all files that it wants at once, and gets them in the order in which they come.

use crate::disk::LayerFile;
use crate::merge::{Content, Tree};
use crate::tar::{TarError, TarReader};
use crate::{ImageError, Limits};
use std::collections::HashMap;
use std::io::{self, Read};

/// Where files' contents come from.
pub(crate) trait Source {
    /// Calls `visit` once with the number of each of these inodes that is a file, in any order, and a reader of its content.
    /// What `visit` leaves unread is skipped.
    fn read(
        &mut self,
        tree: &Tree,
        inodes: &[u32],
        visit: &mut dyn FnMut(u32, &mut dyn Read) -> Result<(), ImageError>,
    ) -> Result<(), ImageError>;
}

/// The layers in the store.
pub(crate) struct Layers<'a> {
    pub(crate) layers: &'a [LayerFile],
    pub(crate) limits: &'a Limits,
}

impl Source for Layers<'_> {
    fn read(
        &mut self,
        tree: &Tree,
        inodes: &[u32],
        visit: &mut dyn FnMut(u32, &mut dyn Read) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut wanted: Vec<HashMap<u32, u32>> = vec![HashMap::new(); self.layers.len()];
        for number in inodes {
            let Content::File {
                size,
                layer,
                ordinal,
            } = tree.inode(*number).content
            else {
                continue;
            };
            if size == 0 {
                visit(*number, &mut io::empty())?;
                continue;
            }
            wanted
                .get_mut(layer as usize)
                .ok_or_else(|| ImageError::Internal("a file is of no layer".to_owned()))?
                .insert(ordinal, *number);
        }
        for (layer, mut wanted) in self.layers.iter().zip(wanted) {
            if wanted.is_empty() {
                continue;
            }
            // The sum over all layers was held to its bound by the indexing.
            let unpacked = layer.open(self.limits.image_bytes_max.0, self.limits)?;
            let mut reader = TarReader::new(unpacked, self.limits);
            let mut ordinal = 0;
            while !wanted.is_empty() {
                let Some(_) = reader.next().map_err(|error| layer.failed(error))? else {
                    return Err(ImageError::Internal("a layer has changed".to_owned()));
                };
                if let Some(number) = wanted.remove(&ordinal) {
                    let mut data = Data {
                        reader: &mut reader,
                        failure: None,
                    };
                    let result = visit(number, &mut data);
                    if let Some(error) = data.failure.take() {
                        return Err(layer.failed(error));
                    }
                    result?;
                }
                ordinal += 1;
            }
        }
        Ok(())
    }
}

/// The data of the entry that a tar reader stands at.
struct Data<'a, R: Read> {
    reader: &'a mut TarReader<R>,
    /// Kept whole, since an I/O error is all that the trait lets through.
    failure: Option<TarError>,
}

impl<R: Read> Read for Data<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read_data(buffer).map_err(|error| {
            self.failure = Some(error);
            io::Error::other("a layer cannot be read")
        })
    }
}
