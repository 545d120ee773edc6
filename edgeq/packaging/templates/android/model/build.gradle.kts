// The language model "@NAME@" as an Android library. In settings.gradle.kts of the app:
//
//     include(":@NAME@")
//     project(":@NAME@").projectDir = file("path/to/@NAME@/android")
//
// and in build.gradle.kts of the app: implementation(project(":@NAME@"))
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "edgeq.model"
    compileSdk = 35

    defaultConfig {
        minSdk = @MIN_SDK@
        // the runtimes' libraries exist for 64-bit ARM; x86_64 is for the emulator
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        testInstrumentationRunner = "androidx.test.runner.AndroidJUnitRunner"
    }

    // One runtime is built into the app; the class edgeq.model.LanguageModel is the same in both.
    flavorDimensions += "runtime"
    productFlavors {
@FLAVORS@
    }

    // The model is read from files, so it must not be compressed within the APK.
    androidResources { noCompress += listOf("litertlm", "data", "onnx", "bin") }

    sourceSets["androidTest"].assets.srcDir("../golden")

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin { jvmToolchain(17) }

@SOURCES@

dependencies {
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.9.0")
@DEPENDENCIES@
    androidTestImplementation("androidx.test:runner:1.6.2")
    androidTestImplementation("androidx.test.ext:junit:1.2.1")
}
