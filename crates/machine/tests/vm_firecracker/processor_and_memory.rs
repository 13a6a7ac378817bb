//! What a guest sees of the processor, and of what its memory is.

use super::*;
use vistara_machine::firecracker::CpuTemplate;

/// Hides `rdrand`, which the processors of today and the translated one of the lab have.
const NO_RDRAND: &str = r#"{"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
    "modifiers": [{"register": "ecx", "bitmap": "0bx0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}], "msr_modifiers": []}"#;

/// Firecracker whose guests see the processor as this template has it.
async fn under(dir: &Path, template: &str) -> Arc<dyn Vmm> {
    let path = dir.join("template.json");
    std::fs::write(&path, template).unwrap();
    let options = FirecrackerOptions {
        cpu_template: Some(CpuTemplate::read(&path).unwrap()),
        ..options()
    };
    Arc::new(FirecrackerVmm::detect(options).await.unwrap())
}

/// Whether the guest of a machine sees `rdrand`.
async fn sees_rdrand(vmm: &dyn Vmm, plan: &LaunchPlan, dir: tempfile::TempDir) -> bool {
    let vm = launch(vmm, plan).await;
    let lines = Lines::open(&*vm).await;
    let mut machine = Running { vm, lines, dir };
    let found = machine.sh("grep -c -w rdrand /proc/cpuinfo").await;
    machine.end_of(&Firecracker).await;
    found != "0"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_see_the_processor_as_the_template_has_it() {
    let Some(vmm) = Firecracker.vmm().await else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let templated = under(files.path(), NO_RDRAND).await;
    assert_ne!(
        vmm.capabilities().cpu_template,
        templated.capabilities().cpu_template
    );
    let dir = tempfile::tempdir().unwrap();
    let plan = Firecracker.plan(dir.path());
    if !sees_rdrand(&*vmm, &plan, dir).await {
        return println!("SKIP: this processor has no rdrand to hide");
    }
    let dir = tempfile::tempdir().unwrap();
    let plan = Firecracker.plan(dir.path());
    assert!(!sees_rdrand(&*templated, &plan, dir).await);

    // A guest that has seen the one processor does not go on with the other.
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Firecracker.plan(dir.path());
    plan.capturable = true;
    let vm = launch(&*templated, &plan).await;
    Lines::open(&*vm).await.echo("up").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let capture = Arc::new(soon("capturing", vm.capture()).await.unwrap());
    let fork = || {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Firecracker.plan(dir.path());
        plan.start = Start::Fork(capture.clone());
        (plan, dir)
    };
    let (plan, _dir) = fork();
    match soon("launching", vmm.launch(&plan)).await.err() {
        Some(VmmError::Unsupported { reason, .. }) => {
            assert!(reason.contains("processor"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let (plan, dir) = fork();
    assert!(!sees_rdrand(&*templated, &plan, dir).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_that_firecracker_refuses_ends_the_launch_with_its_reason() {
    if Firecracker.vmm().await.is_none() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let vmm = under(files.path(), r#"{"cpuid_modifiers": 3}"#).await;
    let dir = tempfile::tempdir().unwrap();
    let error = soon("launching", vmm.launch(&Firecracker.plan(dir.path()))).await;
    let text = error.err().unwrap().to_string();
    assert!(text.contains("cpu-config"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
