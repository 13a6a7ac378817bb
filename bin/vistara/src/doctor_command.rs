//! `vistara doctor`: what this host has and lacks, and the commands that mend it.

use crate::arguments::DoctorOptions;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::text::{table, visible};
use vistara_api::{Client, DoctorReport};

/// `vistara doctor`: exit code 1 where machines cannot run.
pub(crate) async fn doctor(client: &Client, options: &DoctorOptions) -> Result<u8, Failure> {
    let report = client.doctor(options.fresh).await?;
    if options.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    Ok(u8::from(!report.ready))
}

fn text(report: &DoctorReport) -> String {
    let rows: Vec<Vec<String>> = report
        .needs
        .iter()
        .map(|need| {
            let required = need.required && need.state != "works";
            vec![
                need.name.clone(),
                format!(
                    "{}{}",
                    need.state,
                    if required { " (required)" } else { "" }
                ),
                need.detail.clone(),
            ]
        })
        .collect();
    let mut out = table(&["NEED", "STATE", "FOUND"], &rows);
    let mends: Vec<_> = report
        .needs
        .iter()
        .filter(|need| need.state != "works")
        .filter_map(|need| Some((need, need.mend.as_ref()?)))
        .collect();
    if !mends.is_empty() {
        out.push_str("\nTo mend:\n");
        for (need, mend) in mends {
            out.push_str(&visible(&format!("  {:<14} {mend}\n", need.name), true));
        }
    }
    out.push_str(if report.ready {
        "\nMachines can run here.\n"
    } else {
        "\nMachines cannot run here yet.\n"
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_api::Need;

    #[test]
    fn what_is_missing_is_said_in_words_with_the_command_that_mends_it() {
        let report = DoctorReport {
            needs: vec![
                Need {
                    name: "qemu".to_owned(),
                    state: "works".to_owned(),
                    detail: "10.0".to_owned(),
                    mend: Some("never shown".to_owned()),
                    required: true,
                },
                Need {
                    name: "linux-kernel".to_owned(),
                    state: "absent".to_owned(),
                    detail: "none added".to_owned(),
                    mend: Some("vistara kernel add debian".to_owned()),
                    required: true,
                },
            ],
            ready: false,
        };
        assert_eq!(
            text(&report),
            "NEED          STATE              FOUND\n\
             qemu          works              10.0\n\
             linux-kernel  absent (required)  none added\n\
             \n\
             To mend:\n  linux-kernel   vistara kernel add debian\n\
             \n\
             Machines cannot run here yet.\n"
        );
    }
}
