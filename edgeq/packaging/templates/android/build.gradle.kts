// The @KIND@ "@NAME@" as an Android library. In settings.gradle.kts of the app:
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
        minSdk = @MIN_SDK@@ABIS@
        testInstrumentationRunner = "androidx.test.runner.AndroidJUnitRunner"
    }

    // One runtime is built into the app; the class edgeq.model.@CLASS@ is the same in both.
    flavorDimensions += "runtime"
    productFlavors {
@FLAVORS@
    }

@RESOURCES@

    sourceSets["androidTest"].assets.srcDir("../golden")

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin { jvmToolchain(17) }

@SOURCES@@LABELS@

dependencies {
@LIBRARIES@@DEPENDENCIES@
    androidTestImplementation("androidx.test:runner:1.7.0")
    androidTestImplementation("androidx.test.ext:junit:1.3.0")
}
